"""How the program ends: full memory, full disks, signals and odd names are one line, and leave nothing half-written."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command import run
from conftest import ROOT

from modiff_trt.core.errors import LINE, InputError, one_line, shown
from modiff_trt.runtime import sampling
from modiff_trt.tools import stopping
from modiff_trt.tools.stopping import exit_code

MODEL = ["--config", str(ROOT / "configs/demo.yml"), "--ckpt", str(ROOT / "calib_cache/demo/model.safetensors")]
RUN = "from modiff_trt.tools.cli.entry import main; main()"
PROGRAM = [sys.executable, "-m", "modiff_trt.tools.cli.entry"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"),
        RuntimeError("std::bad_alloc"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
)
def test_a_full_memory_names_the_batch_and_leaves_nothing(tmp_path, capsys, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(sampling, "sample_trajectory", full)
    for out in (tmp_path / "x/images", tmp_path / "x/o.npz"):
        job = ["sample", *MODEL, "--timesteps", 2, "--num-samples", 6, "--batch-size", 6, "--out", out]
        assert run(*job) == 2
        said = capsys.readouterr().err
        assert "memory is full" in said and "--batch-size 3" in said and said.count("\n") == 1
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [] and not (tmp_path / "x/images").exists()


def test_the_batch_that_is_named_is_one_that_fits(tmp_path, capsys, monkeypatch):
    """Room for two images at a time."""
    from modiff_trt.runtime.backends.torch_denoiser import TorchDenoiser

    reset = TorchDenoiser.reset

    def of_two(self, batch, context=None):
        if batch > 2:
            raise MemoryError
        reset(self, batch, context)

    monkeypatch.setattr(TorchDenoiser, "reset", of_two)
    job = ["sample", *MODEL, "--timesteps", 2, "--num-samples", 14, "--out", tmp_path / "o.npz"]
    assert run(*job, "--batch-size", 14) == 2
    assert "a batch of 14 does not fit; a batch of 1 does: pass --batch-size 1" in capsys.readouterr().err
    assert run(*job, "--batch-size", 4) == 2
    assert "a batch of 4 does not fit; a batch of 2 does: pass --batch-size 2" in capsys.readouterr().err


def test_lines_are_bounded_and_values_too():
    said = []
    assert exit_code(lambda: refuse("x" * 10**6), said.append) == 2
    assert len(said[0]) < LINE + 30
    nested = []
    for _ in range(1000):
        nested = [nested, nested]
    for value in ("a" * 10**6, list(range(10**6)), 10**5000, nested, {"a": ["b"] * 1000}):
        assert len(shown(value)) <= 80
    assert one_line("a\n  b") == "a b"


def refuse(message):
    raise InputError(message)


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run([*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "No space left" in result.stderr, result.stderr


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0, print)
    with pytest.raises(OSError):
        exit_code(lambda: fail(OSError(5000, "odd")), print)


def fail(error):
    raise error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["importing", "sampling"])
def test_signals_end_it_with_one_line_and_no_temporary_file(tmp_path, number, moment):
    job = ["sample", *MODEL, "--timesteps", 200, "--num-samples", 400, "--batch-size", 1, "--out", tmp_path / "images"]
    # A shell's background jobs ignore SIGINT, and so do their children, unless they set a handler.
    start = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler); {RUN}", *map(str, job)]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        begin = time.monotonic()
        while not (tmp_path / "images/manifest.json").exists() and moment == "sampling" and time.monotonic() - begin < 120:
            time.sleep(0.05)
        time.sleep(0.4)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.strip() == stopping.GO_ON, said
    assert not list(tmp_path.rglob("*.part"))


def test_an_interruption_inside_executed_text_ends_with_the_code_too(tmp_path):
    """Python would end a module's process by SIGINT itself: -2, where 130 was asked for."""
    program = """
import sys
from modiff_trt.tools.stopping import exit_code
sys.exit(exit_code(lambda: exec("raise KeyboardInterrupt"), print))
"""
    (tmp_path / "interrupted_module.py").write_text(program)
    command = [sys.executable, "-m", "interrupted_module"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (130, stopping.GO_ON), result.stderr


@pytest.mark.parametrize("value", ["wide", "", "-1", "\u00b2", "9" * 5000])
def test_odd_widths_of_a_terminal_do_not_matter(value):
    environment = os.environ | {"COLUMNS": value, "LINES": value}
    for arguments, code in ((["--help"], 0), (["sample", "--out", "x", "--timesteps", "many"], 2)):
        result = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == code and "Traceback" not in result.stderr, result.stderr


def test_output_under_dev_shm_is_an_ordinary_file():
    out = f"/dev/shm/modiff-test-{os.getpid()}.safetensors"
    job = ["collect", *MODEL, "--timesteps", 2, "--num-samples", 2, "--batch-size", 1, "--out", out]
    try:
        assert run(*job) == 0 and run(*job) == 0
    finally:
        for left in (out, out + ".part"):
            if os.path.exists(left):
                os.unlink(left)


def test_outputs_that_are_no_files_are_one_line(tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "a", tmp_path / ("n" * 300 + ".npz"), "/proc/self/comm", tmp_path / "pipe"):
        assert run("collect", *MODEL, "--timesteps", 2, "--out", out) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said


def test_inputs_that_are_no_files_are_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    odd = os.fsdecode(b"\xff\xfe.safetensors")
    for name in ("pipe.safetensors", "loop.safetensors", "n" * 300, odd, "a\0b"):
        ckpt = tmp_path / name
        assert run("sample", *MODEL[:2], "--ckpt", ckpt, "--timesteps", 2, "--out", tmp_path / "o.npz") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said


def test_another_number_of_steps_is_said_before_sampling(tmp_path, capsys, caplog):
    """The right numbers are those of DDIM's code: every 1000 // 53 = 18th timestep are 56, every 1000 // 600 = 1st are 1000."""
    assert len(range(0, 1000, 1000 // 53)) == 56 and len(range(0, 1000, 1000 // 600)) == 1000
    from modiff_trt.core.ddim_yaml import load_config
    from modiff_trt.core.kinds import Spacing
    from modiff_trt.core.solvers import Solver

    config = load_config(ROOT / "configs/demo.yml").diffusion
    with caplog.at_level("INFO"):
        Solver(spacing=Spacing.UNIFORM).requested(config, 53)
        Solver(spacing=Spacing.UNIFORM).requested(config, 600)
        Solver(spacing=Spacing.UNIFORM).requested(config, 50)
        Solver(spacing=Spacing.QUAD).requested(config, 53)
    assert ["become 56" in caplog.messages[0], "become 1000" in caplog.messages[1], len(caplog.messages)] == [True, True, 2]
    out = tmp_path / "o.npz"
    assert (
        run("sample", *MODEL, "--timesteps", 334, "--skip-type", "uniform", "--num-samples", 1, "--eta", "nan", "--out", out)
        == 2
    )
    assert "become 500" in caplog.text or "become 500" in capsys.readouterr().err


def test_one_step_cannot_be_modulated_and_the_advice_can_be_followed(tmp_path, capsys):
    trajectories = tmp_path / "t.safetensors"
    assert run("collect", *MODEL, "--timesteps", 1, "--num-samples", 1, "--out", trajectories) == 0
    job = ["calibrate", *MODEL, "--trajectories", trajectories, "--preset", "fast", "--out", tmp_path / "s.safetensors"]
    assert run(*job) == 2
    said = capsys.readouterr().err
    assert "--method qdiff" in said and "--timesteps" in said and "--calib-steps" not in said
    assert run(*job, "--method", "qdiff") == 0


def test_two_runs_into_one_folder_at_once_are_never_mixed(tmp_path):
    """The second begins while the first computes its first batch: one of them makes the set, and the manifest is its own."""
    out = tmp_path / "images"
    common = [*PROGRAM, "sample", *MODEL, "--timesteps", "10", "--num-samples", "2", "--batch-size", "2", "--out", str(out)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    processes = [subprocess.Popen([*common, "--seed", seed], **options) for seed in "01"]
    ends = [process.communicate(timeout=300) and process.returncode for process in processes]
    assert sorted(ends) == [0, 2]
    import json

    assert json.loads((out / "manifest.json").read_text())["seed"] == ends.index(0)
    alone = tmp_path / "alone"
    again = [*common[:-1], str(alone), "--seed", str(ends.index(0))]
    assert subprocess.run(again, capture_output=True, check=False, env=options["env"]).returncode == 0
    from PIL import Image

    for name in ("00000.png", "00001.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), np.asarray(Image.open(alone / name)))
