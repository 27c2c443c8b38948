import json

import pytest
import yaml
from conftest import ROOT

from modiff_trt.core.config import config_to_dict, model_fingerprint, stored_config
from modiff_trt.core.ddim_yaml import config_from_dict, load_config
from modiff_trt.core.errors import InputError


def tree():
    return yaml.safe_load((ROOT / "configs/cifar10.yml").read_text())


def test_round_trip():
    config = load_config(ROOT / "configs/cifar10.yml")
    assert config.architecture.channels == (128, 256, 256, 256) and config.optim.eps == 1e-8
    assert stored_config(json.loads(json.dumps(config_to_dict(config))), "copy") == config


def test_ddim_spelling_of_floats_and_extra_known_keys(tmp_path):
    text = (
        (ROOT / "configs/cifar10.yml")
        .read_text()
        .replace("0.00000001", "1e-8")
        .replace('"CIFAR10"', '"LSUN"\n    category: "bedroom"')
    )
    file = tmp_path / "c.yml"
    file.write_text(text)
    config = load_config(file)
    assert config.optim.eps == 1e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(chanels=3), "unknown key 'model.chanels'"),
        (lambda t: t["diffusion"].update(schedule="cosine"), "unknown key 'diffusion.schedule'"),
        (lambda t: t["sampling"].update(skip_type="uniform"), "'skip_type' changes the images"),
        (lambda t: t.update(runner={"timesteps": 50}), "'timesteps' changes the images"),
        (lambda t: t["model"].update(num_res_blocks=10**9), "num_res_blocks must be at most"),
        (lambda t: t["model"].update(ch=10**5000), "model.ch must be at most"),
        (lambda t: t["model"].update(dropout=10**400), "'model.dropout' must be of type float"),
        (lambda t: t["model"].update(type="x" * 10**6), "model.type '"),
        (lambda t: t["model"].pop("ch_mult"), "missing key 'model.ch_mult'"),
        (lambda t: t.pop("diffusion"), "missing key 'diffusion'"),
        (lambda t: t["model"].update(ch="wide"), "'model.ch' must be of type int"),
        (lambda t: t["model"].update(ch_mult=[1, "2"]), "'model.ch_mult' must be a list of integers"),
        (lambda t: t["model"].update(ch=100), "multiple of 32"),
        (lambda t: t["model"].update(type="bayesian"), "not supported"),
        (lambda t: t["data"].update(image_size=30), "not divisible by 8"),
        (lambda t: t["data"].update(channels=1), "differ"),
        (lambda t: t["diffusion"].update(beta_schedule="cosine"), "'cosine' is unknown"),
        (lambda t: t["diffusion"].update(beta_end=2.0), "beta_start and beta_end"),
        (lambda t: t.update(model=[1]), "'model' must be a mapping"),
        (lambda t: t["data"].update(rescaled=False), "data.rescaled"),
        (lambda t: t["data"].update(logit_transform=True), "logit_transform"),
        (lambda t: t["diffusion"].update(num_diffusion_timesteps=10**12), "must lie between 2 and"),
    ],
)
def test_errors_name_the_key(change, message):
    broken = tree()
    change(broken)
    with pytest.raises(InputError, match=message.replace(".", r"\.")) as error:
        config_from_dict(broken, "file.yml", [])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
        ("{" * 900, "not valid YAML"),
        ("[" * 100_000, "nested too deeply"),
        ("", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ('a: !!int ""', "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp foo", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        (
            "a: &a {x: 1}\n"
            + "\n".join(f"{c}: &{c} {{<<: [*{p}, *{p}]}}" for p, c in zip("abcdefghijklm", "bcdefghijklmn", strict=True)),
            "aliases",
        ),
    ],
)
def test_not_a_configuration(tmp_path, text, message):
    file = tmp_path / "c.yml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(file)


def test_fingerprint_ignores_training_but_not_the_network():
    base = tree()
    same, other = tree(), tree()
    same["optim"]["lr"] = 1.0
    same["model"]["dropout"] = 0.0
    other["model"]["num_res_blocks"] = 3
    a, b, c = (model_fingerprint(config_from_dict(t, "")) for t in (base, same, other))
    assert a == b != c


def test_keys_of_other_forks_are_ignored_and_named(tmp_path, caplog):
    changed = tree()
    changed["data"]["root"] = changed["training"]["wandb"] = "x"
    changed["logging"] = {"dir": "y"}
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(changed))
    with caplog.at_level("INFO"):
        assert load_config(file) == load_config(ROOT / "configs/cifar10.yml")
    (line,) = caplog.messages
    assert all(name in line for name in ("ignored", "data.root", "logging", "training.wandb"))
    with pytest.raises(InputError, match="unknown key 'extra'"):  # of a manifest, which this program wrote
        config_from_dict(tree() | {"extra": 1}, "m")
