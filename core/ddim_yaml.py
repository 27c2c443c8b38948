"""Configurations from the YAML files that DDIM (arXiv 2010.02502) uses: its UNet as one of ours."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modiff_trt.core.compvis_yaml import compvis_config, is_compvis
from modiff_trt.core.config import (
    LARGEST_IMAGE,
    MOST_LAYERS,
    MOST_LEVELS,
    Architecture,
    Config,
    DiffusionConfig,
    OptimConfig,
    TrainingConfig,
    build,
    check_config,
    refuse_unknown,
)
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import read_file
from modiff_trt.core.kinds import Resampling
from modiff_trt.core.solvers import Solver

# A file's aliases stand for what they repeat: a few of them in a chain make it longer than any memory.
MOST_ALIASES = 20
# Its scanner needs a time that grows with the square of the depth.
LONGEST, MOST_BRACKETS = 1 << 20, 1000
LARGEST = {"ch": 16384, "num_res_blocks": MOST_LAYERS, "in_channels": 1024, "out_ch": 1024, "image_size": LARGEST_IMAGE}
LARGEST_MULT = 64
# What this network has, whatever its size: normalization of 32 groups, and an embedding of the timestep four times as wide.
GROUPS, EPS, TIME_WIDTH = 32, 1e-6, 4
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
class TrainingSection:
    batch_size: int = TrainingConfig.batch_size


@dataclass(frozen=True)
class DdimConfig:
    """One DDIM configuration file. `data`, `model` and `diffusion` are required; the rest only matters for training."""

    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    training: TrainingSection = field(default_factory=TrainingSection)
    optim: OptimConfig = field(default_factory=OptimConfig)


def load_config(path: Path) -> Config:
    """Reads a YAML file of DDIM, or of CompVis' latent diffusion. Keys of other forks that do not matter here are named in the
    log. Raises InputError naming the first unknown, missing or ill-typed key."""
    tree = read_yaml(path)
    if is_compvis(tree):
        return compvis_config(tree, f"config {path}")[0]
    ignored: list[str] = []
    config = config_from_dict(tree, f"config {path}", ignored)
    if ignored:
        logging.getLogger(__name__).info("config %s: ignored %s, which this program has no use for", path, ", ".join(ignored))
    return config


def config_solver(path: Path) -> Solver:
    """The sampler that a configuration comes with: that of latent diffusion, or DDIM's."""
    tree = read_yaml(path)
    return compvis_config(tree, f"config {path}")[1] if is_compvis(tree) else Solver()


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises InputError."""
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
    return tree


def config_from_dict(tree: Any, source: str, ignored: list[str] | None = None) -> Config:
    """Builds a Config from the nested dictionaries of a DDIM file; `source` names the origin in errors. Keys that do not matter
    here are appended to `ignored`; without it they are refused."""

    def unknown(source: str, prefix: str, key: Any, value: Any, known: list[str]) -> None:
        if meant := _meaningful(key, value):
            raise InputError(f"{source}: '{meant}' changes the images; leave it out, and pass it as an option of the command")
        if isinstance(key, str) and key in UNUSED.get(prefix.rstrip("."), ()):
            return
        if ignored is None or (prefix and prefix.rstrip(".") not in LENIENT):
            refuse_unknown(source, prefix, key, value, known)
        elif ignored is not None:
            ignored.append(f"{prefix}{shown(key)[1:-1] if isinstance(key, str) else shown(key)}")

    file: DdimConfig = build(DdimConfig, tree, source, unknown=unknown)
    _validate(file, source)
    training = TrainingConfig(file.training.batch_size, file.model.dropout, file.model.ema_rate)
    config = Config(_architecture(file), file.diffusion, training=training, optim=file.optim)
    check_config(config, source)
    return config


def _architecture(file: DdimConfig) -> Architecture:
    model, size = file.model, file.data.image_size
    levels = len(model.ch_mult)
    heads = tuple(int(size >> level in model.attn_resolutions) for level in range(levels))
    return Architecture(
        in_channels=model.in_channels,
        out_channels=model.out_ch,
        height=size,
        width=size,
        base=model.ch,
        channels=tuple(model.ch * mult for mult in model.ch_mult),
        layers=(model.num_res_blocks,) * levels,
        down_heads=heads,
        mid_heads=1,
        up_heads=heads[::-1],
        down_sampling=(Resampling.CONV if model.resamp_with_conv else Resampling.PLAIN,) * levels,
        up_sampling=(Resampling.CONV if model.resamp_with_conv else Resampling.PLAIN,) * levels,
        down_padding=0,
        groups=GROUPS,
        eps=EPS,
        scale_shift=False,
        mid_norm=True,
        time_channels=TIME_WIDTH * model.ch,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_depth=(0,) * levels,
        mid_depth=0,
        up_depth=(0,) * levels,
        cross_channels=0,
        classes=0,
        added_channels=0,
        added_times=0,
    )


def _meaningful(key: Any, value: Any) -> str | None:
    """The key, or one directly inside its section, that is an option of the commands."""
    if isinstance(key, str) and key in MEANINGFUL:
        return key
    inside = value if isinstance(value, dict) else {}
    return next((k for k in inside if isinstance(k, str) and k in MEANINGFUL), None)


def _validate(config: DdimConfig, source: str) -> None:
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
