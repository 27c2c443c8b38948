"""The deployed sampler, run as its user runs it: in a new environment that has no torch and nothing of this project."""

import json
import os
import subprocess
import sys
import venv

import numpy as np
import pytest
from command import run as command
from conftest import ROOT

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Spacing
from modiff_trt.core.solvers import Solver
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx
from modiff_trt.runtime.backends.plan import Plan
from modiff_trt.runtime.backends.registry.steps import SolverOptions
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.tools.package.packing import LAUNCHER, _plan_requirements, package


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    base = tmp_path_factory.mktemp("sampler")
    save_onnx(base / "m.onnx", build_onnx(tiny.network, tiny.checkpoint, tiny.scales(act_bits=6), "fp32", "x"))
    package(base / "m.onnx", base / "deployed")
    return base / "deployed"


def run(folder, *arguments, python=sys.executable, **environment):
    command = [str(python), str(folder / LAUNCHER), *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=clean | environment)


def test_mistakes_are_one_line(folder, tmp_path):
    for arguments in ([], ["-n", "x", "-o", tmp_path / "o"], ["-n", 1, "--eta", 2, "-o", tmp_path / "o"]):
        result = run(folder, *arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result
    assert not (tmp_path / "o").exists()


def expected(folder, count):
    model = load_onnx(folder / "network.onnx")
    noise = ImageNoise(0, range(count), model.config.input_shape).draw()
    denoiser = OnnxDenoiser(model)
    return sample_trajectory(denoiser, Solver().updates(model.config.diffusion, denoiser.rows.timesteps), noise)


@pytest.mark.slow
def test_it_samples_in_a_new_environment_without_torch(folder, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"]
    subprocess.run(install, check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    assert subprocess.run([python, "-c", "import modiff_trt"], capture_output=True, check=False).returncode != 0
    result = run(folder, "-n", 3, "-o", tmp_path / "o.npz", python=python)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "o.npz") as archive:
        np.testing.assert_allclose(archive["samples"], expected(folder, 3), atol=1e-4)


def test_it_needs_nothing_of_the_checkout(folder, tmp_path):
    assert os.access(folder / LAUNCHER, os.X_OK)
    result = run(folder, "-n", 2, "--seed", 0, "-o", tmp_path / "images")
    assert result.returncode == 0 and "2 images" in result.stdout, result.stderr
    assert sorted(p.name for p in (tmp_path / "images").glob("*.png"))
    again = run(folder, "-n", 2, "-o", tmp_path / "images")
    assert "0 of them made now" in again.stdout


def test_it_refuses_in_one_line(folder, tmp_path):
    assert run(folder, "-n", 0, "-o", tmp_path / "o.npz").returncode == 2
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(folder), str(broken)], check=True)
    (broken / "network.onnx").write_bytes(b"x")
    result = run(broken, "-n", 1, "-o", tmp_path / "o.npz")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert json.loads((folder / "about.json").read_text())["network"]["method"] == "modiff"


def test_an_existing_folder_is_not_overwritten(folder, tmp_path):
    with pytest.raises(InputError, match="not an empty folder"):
        package(folder / "network.onnx", folder)
    with pytest.raises(InputError, match="does not exist"):
        package(tmp_path / "none.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("runtime", "compatible", "needed"),
    [
        ("rtx", False, "tensorrt-rtx-cu13==11.4"),
        ("tensorrt", False, "tensorrt-cu13==11.4"),
        ("tensorrt", True, "tensorrt-lean-cu13==11.4"),
    ],
)
def test_a_sampler_asks_for_the_least_tensorrt_that_runs_its_plan(tmp_path, runtime, compatible, needed):
    manifest = {"runtime": runtime, "version": "11.4", "options": {"version_compatible": compatible}}
    assert _plan_requirements(Plan(tmp_path / "p.plan", b"", manifest, {}, None)) == ("cuda-python>=13", needed)


@pytest.mark.parametrize("options", [{"timesteps": 3}, {"solver": SolverOptions(spacing=Spacing.LEADING)}])
def test_other_steps_than_the_calibrated_are_refused(folder, tmp_path, options):
    with pytest.raises(InputError, match="was calibrated for"):
        package(folder / "network.onnx", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_folder_says_what_it_is_and_pins_what_it_was_packed_with(folder):
    text = (folder / "README.md").read_text()
    model = load_onnx(folder / "network.onnx")
    assert model.manifest["checkpoint_sha256"] in text and f"./{LAUNCHER} -n 64 --seed 0 -o images" in text
    assert "--context" not in text and "--device cuda" not in text
    lines = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in lines) and f"numpy=={np.__version__}" in lines


def test_a_network_with_prompts_samples_as_the_command_does(tmp_path):
    classes, prompts = ROOT / "calib_cache/demo_classes", ROOT / "calib_cache/demo_classes/classes.npz"
    exported = tmp_path / "n.onnx"
    assert command("export", "--model", classes, "--out", exported) == 0
    assert command("package", "--onnx", exported, "--timesteps", 3, "--out", tmp_path / "s") == 0
    assert "`encoder_hidden_states`" in (tmp_path / "s/README.md").read_text()
    given = ["--context", prompts, "--guidance", "2"]
    result = run(tmp_path / "s", "-n", 3, *given, "-o", tmp_path / "a.npz")
    assert result.returncode == 0, result.stderr
    job = ["sample", "--backend", "onnx", "--onnx", exported, "--timesteps", 3, "--num-samples", 3, *given]
    assert command(*job, "--out", tmp_path / "b.npz") == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_array_equal(a["samples"], b["samples"])
        assert np.abs(a["samples"][0] - a["samples"][1]).max() > 0.1
    without = run(tmp_path / "s", "-n", 3, "-o", tmp_path / "c.npz")
    assert without.returncode == 2 and "--context FILE.npz" in without.stderr and without.stderr.count("\n") == 1
    assert run(tmp_path / "s", "-n", 3, *given[:2], "-o", tmp_path / "d.npz").returncode == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "d.npz") as d:
        assert np.abs(a["samples"] - d["samples"]).max() > 0.01  # guidance does something
