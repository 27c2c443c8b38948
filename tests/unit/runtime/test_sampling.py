"""Sampling in several processes, and after interruptions: always the same files."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_checkpoint, tiny_config
from PIL import Image

from modiff_trt.core.errors import InputError
from modiff_trt.core.solvers import Solver
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.torch_denoiser import TorchDenoiser
from modiff_trt.runtime.sampling import Backend, Rank, run_sampling

COUNT = 11


@pytest.fixture(scope="module")
def network(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "m.onnx"
    save_onnx(path, build_onnx(tiny.network, tiny.checkpoint, tiny.scales(act_bits=6), "fp32", "x"))
    return path


def start(network, out, *more, **environment):
    import os

    which = [] if "--seeds" in more else ["--num-samples", COUNT]
    arguments = ["--backend", "onnx", "--onnx", network, *which, "--batch-size", 2, "--out", out, *more]
    command = [sys.executable, "-m", "modiff_trt.tools.cli.main", "sample", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | environment, text=True, **pipes)


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def alone(network, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "images"
    process = start(network, out)
    assert process.wait() == 0, process.stderr.read()
    found = pictures(out)
    assert len(found) == COUNT
    return found


def test_ranks_make_the_same_files_between_them(network, alone, tmp_path):
    processes = [start(network, tmp_path / "images", RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0], processes[0].stderr.read()
    assert "share 1 of 3, 4 images" in processes[0].stdout.read()
    assert pictures(tmp_path / "images") == alone


def test_a_range_of_images_is_that_part_of_the_series(network, alone, tmp_path):
    process = start(network, tmp_path / "part", "--seeds", "4-7")
    assert process.wait() == 0, process.stderr.read()
    assert pictures(tmp_path / "part") == {f"{i:05d}.png": alone[f"{i:05d}.png"] for i in range(4, 8)}


def test_given_noise_belongs_to_the_image_of_its_row(network, tmp_path):
    noise = np.random.default_rng(0).standard_normal((4, *load_onnx(network).config.input_shape), np.float32)
    np.save(tmp_path / "x.npy", noise)
    for out, seeds in (("all", "0-3"), ("part", "2-3")):
        process = start(network, tmp_path / out, "--seeds", seeds, "--noise", tmp_path / "x.npy")
        assert process.wait() == 0, process.stderr.read()
    assert pictures(tmp_path / "part").items() < pictures(tmp_path / "all").items()


def test_batches_are_cut_before_they_are_dealt_out():
    indices = range(5, 5 + COUNT)
    whole = Rank().batches(indices, 2)
    assert sorted(batch for rank in range(3) for batch in Rank(rank, 3).batches(indices, 2)) == whole
    assert [i for batch in whole for i in batch] == list(indices)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_files(network, alone, tmp_path):
    chance = random.Random(0)
    for attempt in range(12):
        process = start(network, tmp_path / "images")
        time.sleep(chance.uniform(0.5, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert pictures(tmp_path / "images").items() <= alone.items(), attempt
        if len(pictures(tmp_path / "images")) == COUNT:
            break
    process = start(network, tmp_path / "images")
    assert process.wait() == 0, process.stderr.read()
    assert pictures(tmp_path / "images") == alone
    assert {path.suffix for path in (tmp_path / "images").iterdir()} <= {".png", ".json", ".part", ".sha256"}


def test_bad_ranks_are_refused(monkeypatch, network, tmp_path):
    for rank, world in (("2", "2"), ("x", "2"), ("-1", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(InputError, match="WORLD_SIZE"):
            Rank.of_environment()
    process = start(network, tmp_path / "x.npz", RANK="0", WORLD_SIZE="2")
    assert process.wait() == 2 and "one .npz" in process.stderr.read()


def test_images_of_channels_that_are_no_picture_go_to_an_npz(tmp_path):
    """Four channels would be written as red, green, blue and transparency, without a word."""
    config = tiny_config()
    config = replace(config, architecture=replace(config.architecture, in_channels=4, out_channels=4))
    network, checkpoint = trace(config), random_checkpoint(config)
    backend = Backend(TorchDenoiser(network, checkpoint.params, (500, 0)), config, Solver(), {})
    job = {"indices": range(2), "seed": 0, "batch_size": 2, "eta": 0.0, "noise_file": None}
    for shards in (False, True):
        with pytest.raises(InputError, match="4 channels"):
            run_sampling(backend, **job, out=tmp_path / "images", shards=shards)
    assert not (tmp_path / "images").exists()
    run_sampling(backend, **job, out=tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as archive:
        assert archive["samples"].shape == (2, 4, 12, 12)
