"""Model and diffusion configuration, read from the YAML files that DDIM (arXiv 2010.02502) uses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modiff_trt.export.errors import InputError

MOST_TIMESTEPS = 100_000
BETA_SCHEDULES = ("linear", "quad", "const", "jsd", "sigmoid")


@dataclass(frozen=True)
class DataConfig:
    image_size: int
    channels: int
    dataset: str = ""
    category: str = ""
    logit_transform: bool = False
    uniform_dequantization: bool = False
    gaussian_dequantization: bool = False
    random_flip: bool = True
    rescaled: bool = True
    num_workers: int = 0


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
    var_type: str = "fixedlarge"
    ema_rate: float = 0.9999
    ema: bool = True


@dataclass(frozen=True)
class DiffusionConfig:
    beta_schedule: str
    beta_start: float
    beta_end: float
    num_diffusion_timesteps: int


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = 128
    n_epochs: int = 10000
    n_iters: int = 5000000
    snapshot_freq: int = 5000
    validation_freq: int = 2000


@dataclass(frozen=True)
class SamplingConfig:
    batch_size: int = 64
    last_only: bool = True
    ckpt_id: int = 0


@dataclass(frozen=True)
class OptimConfig:
    weight_decay: float = 0.0
    optimizer: str = "Adam"
    lr: float = 2e-4
    beta1: float = 0.9
    amsgrad: bool = False
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass(frozen=True)
class Config:
    """One DDIM configuration file. `data`, `model` and `diffusion` are required; the rest only matters for training."""

    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.model.in_channels, self.data.image_size, self.data.image_size)


def load_config(path: Path) -> Config:
    """Reads a DDIM YAML file. Raises InputError naming the first unknown, missing or ill-typed key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist; pass --config FILE (configs/cifar10.yml is an example)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"config {path} is not valid YAML: {where}") from None
    return config_from_dict(tree, str(path))


def config_from_dict(tree: Any, source: str) -> Config:
    """Builds a Config from nested dictionaries (YAML or a manifest's JSON); `source` names the origin in errors."""
    config: Config = _build(Config, tree, source, "")
    _validate(config, source)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def model_fingerprint(config: Config) -> str:
    """SHA-256 over what decides the network and its diffusion process (not training options)."""
    parts = {"model": dataclasses.asdict(config.model), "diffusion": dataclasses.asdict(config.diffusion)}
    for ignored in ("dropout", "ema", "ema_rate", "var_type", "type"):
        del parts["model"][ignored]
    parts["image_size"] = {"image_size": config.data.image_size}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build(cls: Any, tree: Any, source: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise InputError(
            f"{source}: '{prefix.rstrip('.') or 'the file'}' must be a mapping of keys, found {type(tree).__name__}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise InputError(f"{source}: unknown key '{prefix}{key}'; known keys here: {known}")
    values = {}
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name in tree:
            values[name] = _convert(tree[name], hints[name], source, prefix + name)
        elif required:
            raise InputError(f"{source}: missing key '{prefix}{name}'")
    return cls(**values)


def _convert(value: Any, hint: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, source, key + ".")
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None or not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
            raise InputError(f"{source}: '{key}' must be a list of integers, found {value!r}")
        return tuple(items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-8 as a string
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    raise InputError(f"{source}: '{key}' must be of type {hint.__name__}, found {value!r}")


def _validate(config: Config, source: str) -> None:
    def check(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"{source}: {message}")

    model, size = config.model, config.data.image_size
    check(config.data.rescaled, "data.rescaled false is not supported: images are mapped from [-1, 1]")
    check(not config.data.logit_transform, "data.logit_transform is not supported")
    check(model.type == "simple", f"model.type '{model.type}' is not supported; only 'simple' is")
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
        f"diffusion.beta_schedule '{diffusion.beta_schedule}' is unknown; use one of {', '.join(BETA_SCHEDULES)}",
    )
    check(
        1 < diffusion.num_diffusion_timesteps <= MOST_TIMESTEPS,
        f"diffusion.num_diffusion_timesteps must lie between 2 and {MOST_TIMESTEPS}",
    )
    check(
        0 < diffusion.beta_start <= diffusion.beta_end < 1,
        "diffusion.beta_start and beta_end must satisfy 0 < start <= end < 1",
    )
