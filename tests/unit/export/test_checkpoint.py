import pickle

import pytest
import torch
from conftest import random_checkpoint, tiny_config
from safetensors.torch import save_file

from modiff_trt.export import checkpoint as module
from modiff_trt.export.checkpoint import load_checkpoint
from modiff_trt.export.config import load_config
from modiff_trt.export.errors import InputError
from modiff_trt.export.files import md5
from modiff_trt.export.unet import trace

CONFIG = tiny_config()
NETWORK = trace(CONFIG)


@pytest.fixture
def state():
    return dict(random_checkpoint(CONFIG).params)


def write(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth"])
def test_formats_prefix_and_half_precision(tmp_path, state, suffix):
    file = write(tmp_path / f"m{suffix}", {f"module.{k}": v.half() for k, v in state.items()})
    loaded = load_checkpoint(file, NETWORK)
    assert list(loaded.params) == list(NETWORK.parameters)
    assert all(p.dtype == torch.float32 for p in loaded.params.values())
    torch.testing.assert_close(loaded.params["conv_in.weight"], state["conv_in.weight"].half().float())


def test_ddim_training_list_uses_the_ema(tmp_path, state):
    ema = {k: v + 1 for k, v in state.items()}
    file = write(tmp_path / "ckpt.pth", [state, {"state": {}, "param_groups": []}, 3, 1000, ema])
    torch.testing.assert_close(load_checkpoint(file, NETWORK).params["conv_out.bias"], ema["conv_out.bias"])


def test_ddim_training_list_without_an_ema_uses_the_model(tmp_path, state):
    file = write(tmp_path / "ckpt.pth", [state, {"state": {}, "param_groups": []}, 3, 1000])
    torch.testing.assert_close(load_checkpoint(file, NETWORK).params["conv_out.bias"], state["conv_out.bias"])


@pytest.mark.parametrize("kind", ["complex", "sparse", "integer", "twice"])
def test_tensors_that_are_no_weights(tmp_path, state, kind):
    bias = state["conv_in.bias"]
    other = {"complex": bias + 1j, "sparse": bias.to_sparse(), "integer": bias.int(), "twice": bias}[kind]
    name = "module.conv_in.bias" if kind == "twice" else "conv_in.bias"
    with pytest.raises(InputError, match="twice" if kind == "twice" else "conv_in.bias is torch"):
        load_checkpoint(write(tmp_path / "c.pt", state | {name: other}), NETWORK)


def test_nested_state_dict(tmp_path, state):
    assert load_checkpoint(write(tmp_path / "c.pt", {"state_dict": state, "epoch": 3}), NETWORK).params


def test_lists_at_most_ten_problems(tmp_path, state):
    state["conv_in.weight"] = torch.zeros(1, 2, 3, 3)
    state["surplus"] = torch.zeros(1)
    for key in list(state)[5:25]:
        del state[key]
    with pytest.raises(InputError) as error:
        load_checkpoint(write(tmp_path / "c.pt", state), NETWORK)
    assert str(error.value).count("missing ") == 10 and "and 12 more" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"conv_in.bias": torch.zeros(5)}), r"conv_in.bias has shape \(5,\), expected \(32,\)"),
        (lambda s: s.update({"new": torch.zeros(1)}), "unexpected new"),
        (lambda s: s.pop("norm_out.bias"), "missing norm_out.bias"),
        (lambda s: s.update({"conv_in.bias": torch.full((32,), torch.nan)}), "NaN or infinite values in 'conv_in.bias'"),
    ],
)
def test_wrong_contents(tmp_path, state, change, message):
    change(state)
    with pytest.raises(InputError, match=message):
        load_checkpoint(write(tmp_path / "c.safetensors", state), NETWORK)


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/modiff-evil", "w"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated(tmp_path, state, suffix):
    file = write(tmp_path / f"c{suffix}", state)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"truncated|damaged"):
        load_checkpoint(file, NETWORK)


def test_pickle_is_never_executed(tmp_path):
    file = tmp_path / "evil.pt"
    torch.save({"a": Evil()}, file)
    with pytest.raises(InputError, match="never executed"):
        load_checkpoint(file, NETWORK)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError):
        load_checkpoint(file, NETWORK)


@pytest.mark.parametrize(
    ("name", "message"), [("none.pt", "does not exist"), ("a.bin", "unknown suffix"), ("x.pt", "no state dict")]
)
def test_unusable_files(tmp_path, name, message):
    if name == "a.bin":
        (tmp_path / name).touch()
    if name == "x.pt":
        torch.save([1, 2], tmp_path / name)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / name, NETWORK)


def test_known_checkpoint_is_named(tmp_path, state, monkeypatch):
    file = write(tmp_path / "c.ckpt", state)
    assert load_checkpoint(file, NETWORK).description == ""
    monkeypatch.setitem(module.KNOWN_MD5, md5(file), "the published one")
    assert load_checkpoint(file, NETWORK).description == "the published one"
    assert "1fa350b952534ae442b1d5235cce5cd3" in module.KNOWN_MD5


def test_full_cifar10_checkpoint_loads_strictly(full_checkpoint, request):
    network = trace(load_config(request.config.rootpath / "configs/cifar10.yml"))
    assert len(load_checkpoint(full_checkpoint, network).params) == 328
