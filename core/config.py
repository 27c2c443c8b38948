"""Model and diffusion configuration, read from the YAML files that DDIM (arXiv 2010.02502) uses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import read_file

MOST_TIMESTEPS = 100_000
# A file's aliases stand for what they repeat: a few of them in a chain make it longer than any memory.
MOST_ALIASES = 20
# Its scanner needs a time that grows with the square of the depth.
LONGEST, MOST_BRACKETS = 1 << 20, 1000
# The largest values that a network could have; beyond them a file is wrong, and building its shapes would not end.
LARGEST = {"ch": 16384, "num_res_blocks": 64, "in_channels": 1024, "out_ch": 1024, "image_size": 16384}
MOST_LEVELS, LARGEST_MULT = 12, 64
# Sections of which other forks' keys do not matter here.
LENIENT = ("data", "training", "optim")
# Keys that would change the images, wherever they stand; they are options here.
MEANINGFUL = {
    *("skip_type", "timesteps", "eta", "sample_type", "solver", "sampler", "prediction", "prediction_type", "clip_sample"),
    *("clip_denoised", "guidance", "guidance_scale", "objective"),
}
# Keys of DDIM's own files that change nothing here, by section: which images it trains on and how often it saves, its choice of
# optimizer (this trainer has Adam), its sampling batch (an option), the variance of another sampler (`var_type`), and
# whether a checkpoint's EMA is used (`--weights`).
UNUSED = {
    "": {"sampling"},
    "data": {"dataset", "category", "uniform_dequantization", "gaussian_dequantization", "random_flip", "num_workers"},
    "model": {"var_type", "ema"},
    "training": {"n_epochs", "n_iters", "snapshot_freq", "validation_freq"},
    "optim": {"optimizer", "amsgrad"},
}
BETA_SCHEDULES = ("linear", "quad", "const", "jsd", "sigmoid")


@dataclass(frozen=True)
class DataConfig:
    image_size: int
    channels: int
    logit_transform: bool = False
    rescaled: bool = True


@dataclass(frozen=True)
class ModelConfig:
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resamp_with_conv: bool
    type: str = "simple"
    dropout: float = 0.0
    ema_rate: float = 0.9999


@dataclass(frozen=True)
class DiffusionConfig:
    beta_schedule: str
    beta_start: float
    beta_end: float
    num_diffusion_timesteps: int


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = 128


@dataclass(frozen=True)
class OptimConfig:
    weight_decay: float = 0.0
    lr: float = 2e-4
    beta1: float = 0.9
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass(frozen=True)
class Config:
    """One DDIM configuration file. `data`, `model` and `diffusion` are required; the rest only matters for training."""

    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.model.in_channels, self.data.image_size, self.data.image_size)


def load_config(path: Path) -> Config:
    """Reads a DDIM YAML file. Keys of other forks that do not matter here are named in the log. Raises InputError naming the
    first unknown, missing or ill-typed key."""
    if not path.exists():
        raise InputError(f"config {path} does not exist; pass --config FILE (configs/cifar10.yml is an example)")
    try:
        text = read_file(path, "config").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} cannot be read: {error}") from None
    if len(text) > LONGEST or text.count("[") + text.count("{") > MOST_BRACKETS:
        raise InputError(f"config {path} is no configuration of a network: it is too long, or nested too deeply")
    try:
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
        tree = yaml.safe_load(text) if aliases <= MOST_ALIASES else None
    except Exception as error:  # the loader raises nearly anything for a value that is not of its tag
        where = " ".join(str(error).split())
        raise InputError(f"config {path} is not valid YAML: {where or type(error).__name__}") from None
    if aliases > MOST_ALIASES:
        raise InputError(f"config {path} has {aliases} aliases, more than the {MOST_ALIASES} that are taken; write values out")
    ignored: list[str] = []
    config = config_from_dict(tree, f"config {path}", ignored)
    if ignored:
        logging.getLogger(__name__).info("config %s: ignored %s, which this program has no use for", path, ", ".join(ignored))
    return config


def config_from_dict(tree: Any, source: str, ignored: list[str] | None = None) -> Config:
    """Builds a Config from nested dictionaries (YAML or a manifest's JSON); `source` names the origin in errors. Keys that do
    not matter here are appended to `ignored`; without it they are refused."""
    config: Config = _build(Config, tree, source, prefix="", ignored=ignored)
    _validate(config, source)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def model_fingerprint(config: Config) -> str:
    """SHA-256 over what decides the network and its diffusion process (not training options)."""
    parts = {"model": dataclasses.asdict(config.model), "diffusion": dataclasses.asdict(config.diffusion)}
    for ignored in ("dropout", "ema_rate", "type"):
        del parts["model"][ignored]
    parts["image_size"] = {"image_size": config.data.image_size}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build(cls: Any, tree: Any, source: str, prefix: str, ignored: list[str] | None) -> Any:
    if not isinstance(tree, dict):
        raise InputError(
            f"{source}: '{prefix.rstrip('.') or 'the file'}' must be a mapping of keys, found {type(tree).__name__}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key in fields:
            continue
        name = f"{prefix}{shown(key)[1:-1] if isinstance(key, str) else shown(key)}"
        if meant := _meaningful(key, value):
            raise InputError(f"{source}: '{meant}' changes the images; leave it out, and pass it as an option of the command")
        if isinstance(key, str) and key in UNUSED.get(prefix.rstrip("."), ()):
            continue
        if ignored is None or (prefix and prefix.rstrip(".") not in LENIENT):
            known = ", ".join(sorted(fields))
            raise InputError(f"{source}: unknown key '{name}'; known keys here: {known}")
        ignored.append(name)
    values = {}
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name in tree:
            values[name] = _convert(tree[name], hints[name], source, key=prefix + name, ignored=ignored)
        elif required:
            raise InputError(f"{source}: missing key '{prefix}{name}'")
    return cls(**values)


def _meaningful(key: Any, value: Any) -> str | None:
    """The key, or one directly inside its section, that is an option of the commands."""
    if isinstance(key, str) and key in MEANINGFUL:
        return key
    inside = value if isinstance(value, dict) else {}
    return next((k for k in inside if isinstance(k, str) and k in MEANINGFUL), None)


def _convert(value: Any, hint: Any, source: str, key: str, ignored: list[str] | None) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, source, prefix=key + ".", ignored=ignored)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None or not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
            raise InputError(f"{source}: '{key}' must be a list of integers, found {shown(value)}")
        return tuple(items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-8 as a string
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif type(value) is hint:
        return value
    raise InputError(f"{source}: '{key}' must be of type {hint.__name__}, found {shown(value)}")


def _validate(config: Config, source: str) -> None:
    def check(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"{source}: {message}")

    model, size = config.model, config.data.image_size
    for key, largest in LARGEST.items():
        found = size if key == "image_size" else getattr(model, key)
        check(
            found <= largest,
            f"{'data' if key == 'image_size' else 'model'}.{key} must be at most {largest}, found {shown(found)}",
        )
    check(len(model.ch_mult) <= MOST_LEVELS, f"model.ch_mult must have at most {MOST_LEVELS} entries")
    check(all(m <= LARGEST_MULT for m in model.ch_mult), f"model.ch_mult must be at most {LARGEST_MULT}")
    check(config.data.rescaled, "data.rescaled false is not supported: images are mapped from [-1, 1]")
    check(not config.data.logit_transform, "data.logit_transform is not supported")
    check(model.type == "simple", f"model.type {shown(model.type)} is not supported; only 'simple' is")
    check(bool(model.ch_mult), "model.ch_mult must not be empty")
    check(all(m > 0 for m in model.ch_mult), "model.ch_mult must be positive")
    check(model.ch > 0 and model.ch % 32 == 0, f"model.ch must be a multiple of 32 (GroupNorm has 32 groups), found {model.ch}")
    check(model.num_res_blocks > 0, "model.num_res_blocks must be at least 1")
    check(model.in_channels > 0 and model.out_ch > 0, "model.in_channels and model.out_ch must be positive")
    check(config.data.channels == model.in_channels, "data.channels and model.in_channels differ")
    check(model.out_ch == model.in_channels, "model.out_ch must equal model.in_channels: the network predicts epsilon")
    factor = 2 ** (len(model.ch_mult) - 1)
    check(size > 0 and size % factor == 0, f"data.image_size {size} is not divisible by {factor}, which model.ch_mult needs")
    diffusion = config.diffusion
    check(
        diffusion.beta_schedule in BETA_SCHEDULES,
        f"diffusion.beta_schedule {shown(diffusion.beta_schedule)} is unknown; use one of {', '.join(BETA_SCHEDULES)}",
    )
    check(
        1 < diffusion.num_diffusion_timesteps <= MOST_TIMESTEPS,
        f"diffusion.num_diffusion_timesteps must lie between 2 and {MOST_TIMESTEPS}",
    )
    check(
        0 < diffusion.beta_start <= diffusion.beta_end < 1,
        "diffusion.beta_start and beta_end must satisfy 0 < start <= end < 1",
    )
