"""The names of `modiff_trt`: images are those of the command line, and bad input is one line."""

import subprocess
import sys

import numpy as np
import pytest
from command import run
from conftest import ROOT

import modiff_trt
from modiff_trt.core.errors import InputError
from modiff_trt.core.rows import plain_rows
from modiff_trt.tools.report.api_page import main as api_page

CONFIG, CKPT = ROOT / "configs/demo.yml", ROOT / "calib_cache/demo/model.safetensors"
SCALES = ROOT / "calib_cache/demo/modiff-w8a8-2m15.safetensors"


def test_every_name_is_there_whatever_was_imported_before():
    """A folder of the same name would take its place once it is imported."""
    import modiff_trt.engines
    import modiff_trt.export
    import modiff_trt.tools

    assert len(modiff_trt.__all__) <= 10
    for name in modiff_trt.__all__:
        assert callable(getattr(modiff_trt, name)), name
    with pytest.raises(AttributeError, match="it has load_model"):
        _ = modiff_trt.nothing


def test_importing_it_is_cheap():
    code = "import modiff_trt, sys; sys.exit('torch' in sys.modules or 'typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys; from modiff_trt.diffusers import ModiffPipeline; sys.exit('torch' in sys.modules or not ModiffPipeline)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    said = subprocess.run([sys.executable, "-m", "modiff_trt", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("modiff-trt ")


@pytest.mark.parametrize("backend", ["native", "torch-sim"])
def test_images_are_those_of_the_command(tmp_path, backend):
    model = modiff_trt.load_model(config=CONFIG, ckpt=CKPT)
    made = modiff_trt.sample(
        modiff_trt.denoiser(model, modiff_trt.load_scales(SCALES, model), backend=backend), images=2, seed=5
    )
    job = ["--backend", backend, "--config", CONFIG, "--ckpt", CKPT, "--scales", SCALES, "--seed", 5, "--num-samples", 2]
    assert run("sample", *job, "--out", tmp_path / "s.npz") == 0
    with np.load(tmp_path / "s.npz") as archive:
        np.testing.assert_array_equal(made, archive["samples"])


def test_the_module_for_diffusers_has_its_two_classes():
    from modiff_trt import diffusers
    from modiff_trt.runtime.diffusers.pipeline import ModiffPipeline
    from modiff_trt.runtime.diffusers.unet import ModiffUNet

    assert (diffusers.ModiffPipeline, diffusers.ModiffUNet) == (ModiffPipeline, ModiffUNet)
    with pytest.raises(AttributeError, match="it has ModiffPipeline, ModiffUNet"):
        _ = diffusers.nothing


def test_what_is_deployed_is_sampled_from_its_path(tmp_path):
    """An exported file gives the command's images; a plan and what is no such file are refused as the command refuses them."""
    file = tmp_path / "m.onnx"
    assert run("export", "--config", CONFIG, "--ckpt", CKPT, "--scales", SCALES, "--dtype", "fp32", "--out", file) == 0
    made = modiff_trt.sample(modiff_trt.denoiser(str(file)), images=2, seed=5)
    job = ["--backend", "onnx", "--onnx", file, "--seed", 5, "--num-samples", 2]
    assert run("sample", *job, "--out", tmp_path / "s.npz") == 0
    with np.load(tmp_path / "s.npz") as archive:
        np.testing.assert_array_equal(made, archive["samples"])
    with pytest.raises(InputError, match="no TensorRT plan"):
        modiff_trt.denoiser(file, stream=77)
    with pytest.raises(InputError, match="carries its scales"):
        modiff_trt.denoiser(file, backend="native")
    with pytest.raises(InputError, match="guidance is for networks with a context"):
        modiff_trt.denoiser(file, guidance=2.0)
    with pytest.raises(InputError, match="--timesteps"):
        modiff_trt.denoiser(file, timesteps=7)
    for path in (tmp_path / "none.onnx", tmp_path / "none.plan", tmp_path):
        with pytest.raises(InputError):
            modiff_trt.denoiser(path)


def test_what_does_not_go_together_is_one_line():
    model = modiff_trt.load_model(config=str(CONFIG), ckpt=str(CKPT))
    scales = modiff_trt.load_scales(str(SCALES), model)
    for options, said in (
        ({"backend": "onnx"}, "must be one of torch, torch-sim, native"),
        ({"scales": scales, "backend": "torch"}, "torch has none"),
        ({"backend": "native"}, "scales go with"),
        ({"scales": scales, "guidance": 3.0}, "guidance is for networks with a context"),
        ({"scales": scales, "stream": 77}, "a stream is for a TensorRT plan"),
    ):
        with pytest.raises(InputError, match=said):
            modiff_trt.denoiser(model, **options)
    full = modiff_trt.denoiser(model, backend="torch", timesteps=3)
    assert np.array_equal(full.denoiser.rows.t, plain_rows(full.denoiser.rows.timesteps).t)
    with pytest.raises(InputError, match="at least 1"):
        modiff_trt.sample(full, images=0)


def test_the_page_is_what_the_code_says():
    api_page(ROOT / "docs/api.md", check=True)
