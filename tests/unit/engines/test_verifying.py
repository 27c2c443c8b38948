"""Verification, with onnxruntime on both sides: what an engine is compared by must find what is wrong, and where."""

from dataclasses import replace

import numpy as np
import pytest

from modiff_trt.engines.verifying import print_verdict, verify
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx

pytest.importorskip("polygraphy")


def denoiser(case, path, dtype, scales=None):
    scales = scales if scales is not None else case.scales(act_bits=6)
    save_onnx(path, build_onnx(case.network, case.checkpoint, scales, dtype, "x"))
    return OnnxDenoiser(load_onnx(path))


def compare(case, reference, candidate, **options):
    settings = {"batch": 2, "passes": 5, "tolerance": 0.05} | options
    return verify(reference, candidate, case.network.config.input_shape, **settings)


def test_the_same_network_in_half_precision_passes(demo, tmp_path, capsys):
    seen, scales = [], demo.scales()
    verdict = compare(
        demo,
        denoiser(demo, tmp_path / "a.onnx", "fp32", scales),
        denoiser(demo, tmp_path / "b.onnx", "fp16", scales),
        on_pass=lambda: seen.append(1),
    )
    assert verdict.first is None and verdict.passes == len(seen) == 5 and 0 < verdict.eps_error < 0.02
    assert print_verdict(verdict, 0.05) == 0 and "equal" in capsys.readouterr().out


def test_a_wrong_layer_is_named(tiny, tmp_path, capsys):
    name = tiny.scales(act_bits=6).modulated[5]
    params = dict(tiny.checkpoint.params)
    params[f"{name}.weight"] = 0.8 * params[f"{name}.weight"]
    wrong = replace(tiny, checkpoint=replace(tiny.checkpoint, params=params))
    right = denoiser(tiny, tmp_path / "a.onnx", "fp32")
    verdict = compare(tiny, right, denoiser(wrong, tmp_path / "b.onnx", "fp32", tiny.scales(act_bits=6)), tolerance=0.01)
    assert verdict.first is not None and verdict.first.output == f"o_hat.{name}" and verdict.first.row == 0
    assert print_verdict(verdict, 0.01) == 1 and name in capsys.readouterr().out


def test_state_that_does_not_move_is_found(tiny, tmp_path):
    """An engine whose aliasing fails starts every pass from the beginning."""

    class Stuck(OnnxDenoiser):
        def __call__(self, x, row):
            self.reset(len(x))
            return super().__call__(x, row)

    reference = denoiser(tiny, tmp_path / "a.onnx", "fp32")
    verdict = compare(tiny, reference, Stuck(load_onnx(tmp_path / "a.onnx")))
    assert verdict.first is not None and verdict.first.row == 1 and verdict.passes == 2


def test_not_a_number_is_a_difference(tiny, tmp_path):
    class Broken(OnnxDenoiser):
        def __call__(self, x, row):
            return super().__call__(x, row) * np.nan

    verdict = compare(tiny, denoiser(tiny, tmp_path / "a.onnx", "fp32"), Broken(load_onnx(tmp_path / "a.onnx")))
    assert verdict.first is not None and verdict.first.output == "eps"
