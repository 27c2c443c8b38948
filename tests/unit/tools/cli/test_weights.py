"""Which weights of a training checkpoint a command takes: said, recorded, chosen, and never mixed."""

import json

import numpy as np
import pytest
import torch
import yaml
from command import run
from conftest import ddim_state, random_checkpoint, tiny_config, tiny_tree
from safetensors.torch import save_file

STEPS = ("--timesteps", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A configuration, a training checkpoint with raw and averaged weights, and each of them alone."""
    folder, config = tmp_path_factory.mktemp("model"), tiny_config()
    tree = tiny_tree()
    (folder / "c.yml").write_text(yaml.safe_dump(tree))
    raw, ema = (ddim_state(random_checkpoint(config, seed).params, 2) for seed in (0, 1))
    torch.save({"state_dict": raw, "ema": ema}, folder / "both.pt")
    save_file(raw, folder / "raw.safetensors")
    save_file(ema, folder / "ema.safetensors")
    return folder


def sample(model, ckpt, out, *more):
    job = ["sample", "--config", model / "c.yml", "--ckpt", model / ckpt, *STEPS, "--num-samples", 1, *more, "--out", out]
    assert run(*job) == 0
    with np.load(out) as archive:
        return archive["samples"], json.loads(str(archive["manifest"]))


def test_samples_are_those_of_the_weights_that_are_said(model, tmp_path, caplog):
    with caplog.at_level("INFO"):
        found, manifest = sample(model, "both.pt", tmp_path / "both.npz")
    assert "both.pt: ema weights ('ema') are used" in caplog.text
    assert manifest["checkpoint_weights"] == "ema weights ('ema')"
    np.testing.assert_array_equal(found, sample(model, "ema.safetensors", tmp_path / "e.npz")[0])
    raw, about = sample(model, "both.pt", tmp_path / "r.npz", "--weights", "raw")
    np.testing.assert_array_equal(raw, sample(model, "raw.safetensors", tmp_path / "raw.npz")[0])
    assert about["checkpoint_weights"].startswith("raw") and about["checkpoint_sha256"] != manifest["checkpoint_sha256"]
    assert np.abs(raw - found).max() > 1e-3


def test_scales_of_the_average_do_not_fit_the_raw_weights(model, tmp_path, capsys):
    both = ["--config", model / "c.yml", "--ckpt", model / "both.pt"]
    assert run("collect", *both, *STEPS, "--num-samples", 2, "--calib-steps", 3, "--out", tmp_path / "t") == 0
    assert run("calibrate", *both, "--trajectories", tmp_path / "t", "--preset", "fast", "--out", tmp_path / "s") == 0
    assert run("export", *both, "--scales", tmp_path / "s", "--out", tmp_path / "m.onnx") == 0
    capsys.readouterr()
    for command in (
        ["calibrate", *both, "--weights", "raw", "--trajectories", tmp_path / "t", "--out", tmp_path / "o"],
        ["export", *both, "--weights", "raw", "--scales", tmp_path / "s", "--out", tmp_path / "o"],
        ["sample", "--backend", "onnx", "--onnx", tmp_path / "m.onnx", "--weights", "raw", "--out", tmp_path / "o.npz"],
    ):
        assert run(*command) == 2
    assert not (tmp_path / "o").exists()
    assert run("sample", *both, "--weights", "best", *STEPS, "--out", tmp_path / "o.npz") == 2
