"""The numbered examples run as they stand. The fourth needs a GPU that TensorRT supports."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT

from modiff_trt.export.onnx.network import build_onnx, save_onnx

pytestmark = pytest.mark.slow
SCRIPTS = sysconfig.get_path("scripts")


# As conftest does here: diffusers must not meet a torchvision that does not fit this torch.
WITHOUT_TORCHVISION = "import runpy, sys; sys.modules['torchvision'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"


def run(name, *arguments, how=()):
    command = [sys.executable, *how, str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_loop():
    found = dict(re.findall(r"(\S+): ([0-9.]+) dB", run("1_loop.py")))
    assert float(found["MoDiff"]) > float(found["Q-Diffusion"]) + 5


def test_own_checkpoint():
    said = run("2_own_checkpoint.py")
    assert "47 modulated layers" in said and "4 images (3, 32, 32)" in said


def test_onnxruntime_alone(tiny, tmp_path):
    save_onnx(tmp_path / "network.onnx", build_onnx(tiny.network, tiny.checkpoint, tiny.scales(dither=False), "fp32", "x"))
    assert "an image of (3, 12, 12)" in run("3_onnxruntime_alone.py", tmp_path / "network.onnx")


def test_diffusers_pipelines(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "m")
    job = ["--model", tmp_path / "m", "--timesteps", 4, "--num-samples", 2, "--preset", "fast", "--min-intensity", 0]
    command = [sys.executable, "-m", "modiff_trt.tools.cli.entry", "quantize", *map(str, job), "--out", str(tmp_path / "q")]
    subprocess.run(command, check=True, capture_output=True)
    said = run("5_diffusers_unet.py", tmp_path / "m", tmp_path / "q" / "scales.safetensors", how=("-c", WITHOUT_TORCHVISION))
    assert "an image of 8x8 pixels in 4 steps of INT8" in said
    assert "2 images of 8x8 pixels" in run("6_quantized_folder.py", tmp_path / "q")


def test_polygraphy_reads_an_inlined_file(tmp_path):
    if shutil.which("polygraphy", path=SCRIPTS) is None:
        pytest.skip("pip install polygraphy")
    environment = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples/7_polygraphy.sh"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-800:] + result.stderr
    assert "QuantizeLinear" in (tmp_path / "layers.txt").read_text() and "trtexec --onnx=" in result.stdout


def test_every_example_is_numbered():
    names = sorted(path.name for path in (ROOT / "examples").glob("*_*"))
    assert [name.split("_")[0] for name in names] == [str(i) for i in range(1, len(names) + 1)]
