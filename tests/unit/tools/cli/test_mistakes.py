"""Every mistake of docs/guide/mistakes.md, made: one line that is the document's, exit code 2, nothing written."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from command import run
from conftest import ROOT
from safetensors.numpy import load_file, save_file

DEMO, CLASSES = ROOT / "calib_cache/demo", ROOT / "calib_cache/demo_classes"
FILES = ["--config", ROOT / "configs/demo.yml", "--ckpt", DEMO / "model.safetensors"]
SCALES = DEMO / "modiff-w8a8.safetensors"


def document():
    """(what happened, its message) of every line of the table."""
    lines = (ROOT / "docs/guide/mistakes.md").read_text().splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")][1:]
    return {what.strip(): message.strip().strip("`") for what, message, _ in cells}


def diffusers_folder(place, network=None, scheduler=None):
    """The demo with classes, with some settings changed."""
    shutil.copytree(CLASSES, place)
    for file, changes in ((place / "unet/config.json", network), (place / "scheduler/scheduler_config.json", scheduler)):
        file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
    return place


@pytest.fixture
def mistakes(tmp_path):
    """The command of each mistake."""
    transformer = diffusers_folder(tmp_path / "transformer", network={"_class_name": "SD3Transformer2DModel"})
    euler = diffusers_folder(tmp_path / "euler", scheduler={"_class_name": "EulerAncestralDiscreteScheduler"})
    sharded = diffusers_folder(tmp_path / "sharded")
    (weights,) = (sharded / "unet").glob("*.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "part-00001-of-00002.safetensors")}
    weights.unlink()
    (sharded / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    other = tmp_path / "other.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(DEMO / "model.safetensors").items()}, other)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "wide.npz", encoder_hidden_states=np.zeros((1, 4, 99), np.float32))
    (tmp_path / "begun").mkdir()
    tiny = ["--timesteps", 2, "--num-samples", 1, "--preset", "fast", "--min-intensity", 0]
    out = ["--out", tmp_path / "out"]
    collect = ["collect", "--timesteps", 2, *out, "--model"]
    found = {
        "another network's configuration": ["quantize", "--config", ROOT / "configs/cifar10.yml", *FILES[2:], *out],
        "a checkpoint of another program": ["quantize", *FILES[:2], "--ckpt", tmp_path / "model.gguf", *out],
        "a path that is not there": ["quantize", *FILES[:2], "--ckpt", tmp_path / "no.ckpt", *out],
        "a folder that is no diffusers folder": ["quantize", "--model", tmp_path / "empty", *out],
        "a transformer instead of a UNet": ["quantize", "--model", transformer, *out],
        "a part of a sharded checkpoint is missing": [*collect, sharded],
        "a scheduler that is no table of steps": [*collect, euler, "--context", CLASSES / "classes.npz"],
        "prompts for another text encoder": [*collect, CLASSES, "--context", tmp_path / "wide.npz"],
        "no prompts": [*collect, CLASSES],
        "scales of another checkpoint": [
            "sample",
            "--backend",
            "native",
            *FILES[:2],
            "--ckpt",
            other,
            "--scales",
            SCALES,
            *out,
        ],
        "other steps than the calibrated ones": [
            *("sample", "--backend", "native", *FILES, "--scales", SCALES, "--timesteps", 20, *out)
        ],
        "a file of another stage": ["calibrate", *FILES, "--trajectories", SCALES, *out],
        "another quantization in the folder": ["quantize", *FILES, *tiny, "--weight-bit", 7, "--out", tmp_path / "begun"],
        "a missing extra": ["build", "--onnx", tmp_path / "n.onnx", "--runtime", "tensorrt", *out],
        "no GPU": ["sample", "--backend", "native", *FILES, "--scales", SCALES, "--device", "cuda", *out],
        "no GPU to run a plan on": ["sample", "--backend", "trt", "--plan", tmp_path / "network.plan", *out],
        "no GPU to build for": ["build", "--onnx", tmp_path / "n.onnx", "--runtime", "rtx", *out],
        "a damaged file": ["sample", "--backend", "onnx", "--onnx", tmp_path / "cut.onnx", *out],
        "a plan of another file": ["verify", "--onnx", tmp_path / "n.onnx", "--plan", tmp_path / "network.plan"],
        "a folder that cannot be written": ["demo", "--out", "/proc/x"],
    }
    return found, tiny


@pytest.mark.parametrize("what", document())
def test_a_mistake_is_the_line_of_the_document(what, mistakes, tmp_path, capsys):
    found, tiny = mistakes
    assert set(found) == set(document())
    command = found[what]
    if what == "no GPU to build for" or "network.plan" in str(command):
        pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    if ".onnx" in str(command) or "network.plan" in str(command):
        assert run("export", *FILES, "--scales", SCALES, "--out", tmp_path / "n.onnx") == 0
    if "network.plan" in str(command):
        half = tmp_path / "half.onnx"
        assert run("export", *FILES, "--dtype", "fp16", "--out", half) == 0
        build = ["build", "--onnx", half, "--no-plugin", "--runtime", "rtx", "--target", "sm89", "--out", tmp_path / "p"]
        assert run(*build) == 0
        (plan,) = (tmp_path / "p").glob("*.plan")
        command = [plan if str(word).endswith("network.plan") else word for word in command]
    if what.startswith("no GPU") and torch.cuda.is_available():
        pytest.skip("there is one")
    if what == "a damaged file":
        (tmp_path / "cut.onnx").write_bytes((tmp_path / "n.onnx").read_bytes()[:5000])
    if what == "another quantization in the folder":
        assert run("quantize", *FILES, *tiny, "--out", tmp_path / "begun") == 0
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert run(*command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    pattern = "error: " + ".*".join(re.escape(part) for part in document()[what].split("..."))
    assert re.fullmatch(pattern, said[-1]), said[-1]
    assert not any("Traceback" in line for line in said)
    assert sorted(path for path in tmp_path.rglob("*")) == before
