import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.tools.research.study import METHODS, SCALE_RECIPES, STARTS, ladder, main, rounded_between


def run(out, parts):
    main(
        config=ROOT / "configs/demo.yml",
        ckpt=ROOT / "calib_cache/demo/model.safetensors",
        out=out,
        timesteps=3,
        images=1,
        calibration_images=2,
        parts=parts,
        bits="4",
        percentile=None,
        weight_bits="8",
        learned=None,
        iterations=2,
        device="cpu",
        seconds=1e9,
    )
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_part_writes_its_figures_and_a_rerun_keeps_them(tmp_path):
    out = tmp_path / "study.json"
    figures = run(out, "methods,starts")
    assert set(figures["methods"]) == {f"{name} A4" for name in METHODS}
    assert set(figures["starts"]) == {f"{name} A4" for name in STARTS}
    figures["methods"]["LTQ A4"] = 123.0
    out.write_text(json.dumps(figures))
    again = run(out, "methods,rows,scales")
    assert again["methods"]["LTQ A4"] == 123.0 and len(again["rows"]) == 3 and len(again["scales"]) == 2 * len(SCALE_RECIPES)


def test_ladder_ends_at_its_floor(tiny):
    scales = ladder(tiny.scales(dither=False), 2, 0.5)
    multipliers = scales.rows.multipliers
    assert (multipliers[-1] == 1).all() and scales.rows.warmup >= 1
    assert (np.diff(multipliers[: scales.rows.warmup], axis=0) <= 0).all()


def test_types_of_the_state(tiny):
    scales = tiny.scales()
    arguments = (tiny.network, tiny.checkpoint.params, scales, "cpu")
    exact = tiny.sample(SimDenoiser(*arguments))
    same = tiny.sample(SimDenoiser(*arguments, between_passes=rounded_between(a_hat=torch.float32, o_hat=torch.float32)))
    np.testing.assert_array_equal(same, exact)
    errors = [
        float(
            np.abs(
                tiny.sample(SimDenoiser(*arguments, between_passes=rounded_between(a_hat=torch.float32, o_hat=dtype))) - exact
            ).mean()
        )
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert 0 < errors[0] < errors[1]
    anew = tiny.sample(
        SimDenoiser(*arguments, between_passes=rounded_between(a_hat=torch.float32, o_hat=torch.float32, refresh=1))
    )
    assert float(np.abs(anew - exact).mean()) < errors[0]  # o_hat is what a_hat implies, up to float32's rounding
