"""A solver on the command line: from trajectories to a deployed sampler, which all move x by the same numbers."""

import subprocess
import sys

import numpy as np
import pytest
from command import run
from conftest import ROOT

from modiff_trt.core.solvers import Solver
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.runtime.backends.registry.options import load_model
from modiff_trt.runtime.images.folders import psnr

MODEL = ["--config", str(ROOT / "configs/demo.yml"), "--ckpt", str(ROOT / "calib_cache/demo/model.safetensors")]
SOLVER = ["--solver", "dpmpp-2m", "--spacing", "logsnr", "--timesteps", "6"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Trajectories, scales and an exported file of six steps of DPM-Solver++."""
    folder = tmp_path_factory.mktemp("solver")
    found = {
        name: folder / f"{name}.{end}" for name, end in (("traj", "safetensors"), ("scales", "safetensors"), ("net", "onnx"))
    }
    assert run("collect", *MODEL, *SOLVER, "--num-samples", 2, "--calib-steps", 6, "--out", found["traj"]) == 0
    assert run("calibrate", *MODEL, "--trajectories", found["traj"], "--preset", "fast", "--out", found["scales"]) == 0
    assert run("export", *MODEL, "--scales", found["scales"], "--out", found["net"]) == 0
    return found


def images(out, *arguments):
    assert run("sample", *arguments, "--num-samples", 2, "--out", out) == 0
    with np.load(out) as archive:
        return archive["samples"]


def test_every_backend_moves_by_the_solver_s_numbers(files, tmp_path):
    reference = images(tmp_path / "f.npz", *MODEL, *SOLVER)
    assert psnr(images(tmp_path / "d.npz", *MODEL, "--timesteps", 6), reference) < 30  # DDIM is elsewhere
    scaled = [*MODEL, "--scales", files["scales"]]
    found = {
        "torch-sim": images(tmp_path / "s.npz", "--backend", "torch-sim", *scaled),
        "native": images(tmp_path / "n.npz", "--backend", "native", *scaled),
        "onnx": images(tmp_path / "o.npz", "--backend", "onnx", "--onnx", files["net"]),
    }
    assert psnr(found["torch-sim"], reference) > 18  # six steps are long ones, and the weights are rounded to nearest
    for name in ("native", "onnx"):
        assert psnr(found[name], found["torch-sim"]) > 27, name
    assert run("package", "--onnx", files["net"], "--out", tmp_path / "sampler") == 0
    launcher = [sys.executable, str(tmp_path / "sampler/modiff-sampler"), "-n", "2", "-o", str(tmp_path / "p.npz")]
    assert subprocess.run(launcher, capture_output=True, check=False).returncode == 0
    with np.load(tmp_path / "p.npz") as archive:
        np.testing.assert_allclose(archive["samples"], found["onnx"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "ddim"], "collect --solver ddim --timesteps 6 --spacing logsnr"),
        (["--timesteps", "7"], "collect --solver dpmpp-2m --timesteps 7 --spacing logsnr"),
        (["--clip-sample", "1"], "--clip-sample 1"),
        (["--eta", "0.5"], "--eta is for --solver ddim"),
        (["--solver", "euler"], "'euler' is not one of 'ddim', 'dpmpp-2m'"),
    ],
)
def test_another_solver_than_the_scales_are_for_is_refused(files, tmp_path, capsys, options, message):
    for of in (["--backend", "torch-sim", *MODEL, "--scales", files["scales"]], ["--backend", "onnx", "--onnx", files["net"]]):
        assert run("sample", *of, *options, "--num-samples", 1, "--out", tmp_path / "o.npz") == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "o.npz").exists()


def test_what_the_scales_are_for_may_be_said_again(files, tmp_path):
    again = [*MODEL, "--scales", files["scales"], *SOLVER]
    assert run("sample", "--backend", "torch-sim", *again, "--num-samples", 1, "--out", tmp_path / "o.npz") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "dpmpp-2m", "--timesteps", "100"], "twice, and dpmpp-2m divides by their distance"),
        (["--steps-offset", "1"], "--steps-offset is for --spacing leading"),
        (["--solver", "dpmpp-2m", "--final-alpha", "first"], "--final-alpha is for --solver ddim"),
        (["--clip-sample", "0"], "--clip-sample must be positive"),
    ],
)
def test_what_a_solver_cannot_do_is_one_line(tmp_path, capsys, options, message):
    for stage in (["collect", *MODEL], ["sample", *MODEL]):
        assert (
            run(
                *stage,
                *options,
                "--num-samples",
                1,
                "--out",
                tmp_path / ("t.safetensors" if stage[0] == "collect" else "o.npz"),
            )
            == 2
        )
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_a_float_file_has_the_scheduler_of_its_folder(tmp_path):
    """Sampled as DDIM's epsilon with quadratic steps, a network of velocities gives noise, and no word of it."""
    from small_diffusers import PIXELS, diffusers, random_network

    folder, out = tmp_path / "model", tmp_path / "net.onnx"
    random_network("UNet2DModel", PIXELS).save_pretrained(folder / "unet")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    assert run("export", "--model", folder, "--out", out) == 0
    for steps in ([], ["--timesteps", 7], ["--timesteps", 5, "--spacing", "leading"]):
        expected = images(tmp_path / "t.npz", "--backend", "torch", "--model", folder, *steps)
        np.testing.assert_allclose(
            images(tmp_path / "o.npz", "--backend", "onnx", "--onnx", out, *steps), expected, rtol=1e-3, atol=1e-3
        )
    assert run("package", "--onnx", out, "--timesteps", 5, "--spacing", "leading", "--out", tmp_path / "sampler") == 0
    launcher = [sys.executable, str(tmp_path / "sampler/modiff-sampler"), "-n", "2", "-o", str(tmp_path / "p.npz")]
    assert subprocess.run(launcher, capture_output=True, check=False).returncode == 0
    with np.load(tmp_path / "p.npz") as archive:
        np.testing.assert_allclose(archive["samples"], expected, rtol=1e-3, atol=1e-3)


def test_a_float_file_of_an_earlier_version_says_which_solver_is_taken(tmp_path, capsys):
    network, checkpoint = load_model(ROOT / "configs/demo.yml", ROOT / "calib_cache/demo/model.safetensors")
    for name, solver in (("old", None), ("new", Solver())):
        save_onnx(tmp_path / f"{name}.onnx", build_onnx(network, checkpoint, None, "fp32", None, solver=solver))
    for name in ("old", "new"):
        images(tmp_path / f"{name}.npz", "--backend", "onnx", "--onnx", tmp_path / f"{name}.onnx", "--timesteps", 2)
        assert ("does not say its solver" in capsys.readouterr().err) == (name == "old")
