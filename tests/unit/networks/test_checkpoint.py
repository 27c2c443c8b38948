import argparse
import hashlib
import pickle
import zipfile

import pytest
import torch
from conftest import ddim_state, random_checkpoint, tiny_config
from safetensors.torch import save_file

from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.core.errors import InputError
from modiff_trt.networks import checkpoint as module
from modiff_trt.networks.checkpoint import load_checkpoint
from modiff_trt.networks.unet2d import trace

CONFIG = tiny_config()
NETWORK = trace(CONFIG)


@pytest.fixture
def state():
    return ddim_state(random_checkpoint(CONFIG).params, 2)


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
    with pytest.raises(InputError, match="unexpected module.conv_in.bias" if kind == "twice" else "conv_in.bias is torch"):
        load_checkpoint(write(tmp_path / "c.pt", state | {name: other}), NETWORK)


def averaged(state):
    return {k: v + 1 for k, v in state.items()}


# As their trainers write them: PyTorch Lightning, timm, torchvision's reference scripts, DiT, BasicSR, lucidrains,
# AveragedModel.
TRAINERS = {
    "lightning": lambda raw, ema: {"state_dict": raw, "ema": ema, "global_step": 3},
    "ema_state_dict": lambda raw, ema: {"state_dict": raw, "ema_state_dict": ema},
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "arch": "unet"},
    "torchvision": lambda raw, ema: {"model": raw, "model_ema": {f"module.{k}": v for k, v in ema.items()} | COUNTER},
    "dit": lambda raw, ema: {"model": raw, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)},
    "basicsr": lambda raw, ema: {"params": raw, "params_ema": ema},
    "compiled": lambda raw, ema: {
        "model": {f"module._orig_mod.{k}": v for k, v in raw.items()},
        "ema": {f"module._orig_mod.{k}": v for k, v in ema.items()},
    },
    "lucidrains": lambda raw, ema: {
        "step": 5,
        "model": {f"model.{k}": v for k, v in raw.items()},
        "ema": {f"online_model.{k}": v for k, v in raw.items()}
        | {f"ema_model.{k}": v for k, v in ema.items()}
        | {"initted": torch.tensor(True), "step": torch.tensor(5)},
    },
    "ddim": lambda raw, ema: [raw, {"state": {}, "param_groups": []}, 3, 1000, ema],
    "one dictionary": lambda raw, ema: raw | {f"ema_model.{k}": v for k, v in ema.items()},
    "litema": lambda raw, ema: {
        "state_dict": {f"model.{k}": v for k, v in raw.items()}
        | {f"model_ema.{k.replace('.', '')}": v for k, v in ema.items()}
        | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    },
    "nested": lambda raw, ema: {"model": raw, "ema": {"decay": 0.999, "shadow": ema}},
}
COUNTER = {"n_averaged": torch.tensor(4)}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_ema_of_every_trainer_is_found_and_either_can_be_chosen(tmp_path, state, trainer):
    ema = averaged(state)
    file = write(tmp_path / "c.pt", TRAINERS[trainer](state, ema))
    found = {wanted: load_checkpoint(file, NETWORK, wanted) for wanted in (None, "ema", "raw")}
    for wanted, expected in ((None, ema), ("ema", ema), ("raw", state)):
        for key, value in expected.items():
            assert torch.equal(ddim_state(found[wanted].params, 2)[key], value), (wanted, key)
        assert found[wanted].chosen and found[wanted].weights.startswith("raw" if wanted == "raw" else "ema")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found[None].sha256 == found["ema"].sha256 == digest != found["raw"].sha256  # scales of one do not fit the other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"model": s, "ema": {"decay": 0.999, "shadow_params": list(s.values())}}, r"'ema'.*--weights raw"),
        (lambda s: {"model": s, "ema_0.999": s, "ema_0.9999": s}, r"several sets.*'model'.*'ema_0.999'.*'ema_0.9999'"),
        (lambda s: {"model": s, "net": s}, "several sets"),
    ],
)
def test_where_it_is_not_clear_which_weights_nothing_is_guessed(tmp_path, state, content, message):
    file = write(tmp_path / "c.pt", content(state))
    with pytest.raises(InputError, match=message):
        load_checkpoint(file, NETWORK)


def test_weights_that_are_not_there(tmp_path, state):
    file = write(tmp_path / "c.pt", {"model": state, "ema_rate": 0.9999, "use_ema": True})
    assert load_checkpoint(file, NETWORK).weights == "raw weights ('model')"
    with pytest.raises(InputError, match="no ema weights; it has raw weights at 'model'"):
        load_checkpoint(file, NETWORK, "ema")
    with pytest.raises(InputError, match="--weights must be"):
        load_checkpoint(file, NETWORK, "best")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "ema_model.", "module.", "module.model."])
def test_prefixes_that_all_names_have_are_taken_off(tmp_path, state, prefix):
    file = write(tmp_path / "c.safetensors", {prefix + k: v for k, v in state.items()})
    assert torch.equal(load_checkpoint(file, NETWORK).params["conv_out.bias"], state["conv_out.bias"])


FOREIGN = {
    "openai": ({"input_blocks.0.0.weight": 1, "time_embed.0.weight": 1}, "guided-diffusion"),
    "compvis": ({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": 1}}, "CompVis"),
    "diffusers": ({"conv_in.weight": 1, "down_blocks.0.resnets.0.conv1.weight": 1}, "diffusers UNet"),
    "qdiff": ({"model.conv_in.weight": 1, "model.conv_in.weight_quantizer.delta": 1}, "modiff-trt calibrate"),
    "calibration": ({"xs": torch.zeros(2), "ts": torch.zeros(2)}, "modiff-trt collect"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_projects_are_named(tmp_path, kind):
    content, message = FOREIGN[kind]

    def tensors(part):
        return {k: tensors(v) if isinstance(v, dict) else torch.zeros(3) if v == 1 else v for k, v in part.items()}

    content = content if kind == "calibration" else tensors(content)
    with pytest.raises(InputError, match=message):
        load_checkpoint(write(tmp_path / "c.pt", content), NETWORK)


def test_names_of_another_program_do_not_pass_for_a_configuration_s_own(tmp_path):
    """Shapes alone would fit, and the answers would be wrong: diffusers pads and embeds in another way."""
    params = random_checkpoint(CONFIG).params
    assert params.keys() == NETWORK.parameters.keys()
    with pytest.raises(InputError, match="diffusers UNet"):
        load_checkpoint(write(tmp_path / "d.safetensors", dict(params)), NETWORK)


def test_folders_and_pickles_of_other_projects_are_named(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "edm.pkl").touch()
    with pytest.raises(InputError, match="diffusers folder"):
        load_checkpoint(tmp_path, NETWORK)
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path / "unet", NETWORK)
    with pytest.raises(InputError, match="EDM"):
        load_checkpoint(tmp_path / "edm.pkl", NETWORK)


def test_a_misfit_shows_what_was_found(tmp_path, state):
    file = write(tmp_path / "c.pt", {f"net.unet.x.{k}": v for k, v in state.items()})
    with pytest.raises(InputError, match=r"it has x\.temb\.dense\.0\.weight.*in all"):
        load_checkpoint(file, NETWORK)


def test_unusual_tensors_are_named_and_usual_ones_taken(tmp_path, state):
    bias = state["conv_in.bias"]
    for kind, other in {
        "float8": bias.to(torch.float8_e4m3fn),
        "nested": torch.nested.nested_tensor([bias, bias[:3]]),
        "meta": bias.to("meta"),
    }.items():
        with pytest.raises(InputError, match=r"conv_in.bias is torch"):
            load_checkpoint(write(tmp_path / f"{kind}.pt", state | {"conv_in.bias": other}), NETWORK)
    with pytest.raises(InputError, match="float8"):
        load_checkpoint(write(tmp_path / "c.safetensors", state | {"conv_in.bias": bias.to(torch.float8_e5m2)}), NETWORK)
    grown = {k: torch.nn.Parameter(v) for k, v in state.items()} | {"conv_in.bias": torch._neg_view(bias)}
    loaded = load_checkpoint(write(tmp_path / "grad.pt", grown), NETWORK).params
    assert torch.equal(loaded["conv_in.bias"], -bias) and not any(p.requires_grad for p in loaded.values())
    loaded["conv_in.weight"].numpy()


def test_a_wrong_checksum_inside_an_archive_is_damage(tmp_path, state):
    file = write(tmp_path / "c.pt", state)
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        at = largest.header_offset + 30 + len(largest.filename) + 200
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)  # which torch does not see
    with pytest.raises(InputError, match="checksum"):
        load_checkpoint(file, NETWORK)


def test_the_digest_is_of_the_bytes_that_were_read(tmp_path, state, monkeypatch):
    """A file that is replaced while it is read: digest and weights are of the same one."""
    file, other = write(tmp_path / "c.safetensors", state), write(tmp_path / "d.safetensors", averaged(state))
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    real = module.read_file

    def replaced_meanwhile(path, what):
        data = real(path, what)
        other.rename(path)
        return data

    monkeypatch.setattr(module, "read_file", replaced_meanwhile)
    loaded = load_checkpoint(file, NETWORK)
    assert loaded.sha256 == before and torch.equal(loaded.params["conv_out.bias"], state["conv_out.bias"])


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
    ("name", "message"), [("none.pt", "does not exist"), ("a.raw", "unknown suffix"), ("x.pt", "no state dict")]
)
def test_unusable_files(tmp_path, name, message):
    if name == "a.raw":
        (tmp_path / name).touch()
    if name == "x.pt":
        torch.save([1, 2], tmp_path / name)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / name, NETWORK)


def test_known_checkpoint_is_named(tmp_path, state, monkeypatch):
    file = write(tmp_path / "c.ckpt", state)
    assert load_checkpoint(file, NETWORK).description == ""
    monkeypatch.setitem(module.KNOWN_MD5, hashlib.md5(file.read_bytes()).hexdigest(), "the published one")
    assert load_checkpoint(file, NETWORK).description == "the published one"
    assert "1fa350b952534ae442b1d5235cce5cd3" in module.KNOWN_MD5


def test_full_cifar10_checkpoint_loads_strictly(full_checkpoint, request):
    network = trace(load_config(request.config.rootpath / "configs/cifar10.yml"))
    assert len(load_checkpoint(full_checkpoint, network).params) == 328
