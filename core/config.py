"""What a network and its diffusion process are: the configuration that every file of ours carries. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.kinds import Resampling

MOST_TIMESTEPS = 100_000
# The largest values that a network could have; beyond them a file is wrong, and building its shapes would not end.
MOST_CHANNELS, LARGEST_IMAGE, MOST_LAYERS, MOST_LEVELS = 1 << 20, 16384, 64, 12
# Numbers of SDXL's `time_ids`: original size, crop and target size, two each.
TIME_IDS = 6
BETA_SCHEDULES = ("linear", "quad", "const", "jsd", "sigmoid")


@dataclass(frozen=True)
class Architecture:
    """A UNet in the terms of diffusers' `UNet2DModel`.

    The first convolution has `base` channels, and the time embedding as many sines and cosines; with diffusers these are the
    first level's. Tuples have one entry for each level, those of the way up beginning at the smallest image. `layers` are the
    residual blocks of a level on its way down; on its way up there is one more. Heads of 0 mean no attention. `scale_shift`
    lets the timestep scale and shift a block's second normalization instead of being added before it. `down_padding` 0 pads a
    strided convolution at the bottom and the right alone, as DDIM does; 1 pads all sides. `mid_norm` says whether the attention
    in the middle normalizes its input.

    Where a level has attention, a depth of 0 is that of its pixels alone, and another is so many transformer blocks, which
    attend to a prompt of `cross_channels` too. `classes` is the number of class labels, 0 where there are none. SDXL's
    `text_embeds` and `time_ids` have `added_channels` together, `added_times` of them sines and cosines of each time id.
    """

    in_channels: int
    out_channels: int
    height: int
    width: int
    base: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    down_heads: tuple[int, ...]
    mid_heads: int
    up_heads: tuple[int, ...]
    down_sampling: tuple[Resampling, ...]
    up_sampling: tuple[Resampling, ...]
    down_padding: int
    groups: int
    eps: float
    scale_shift: bool
    mid_norm: bool
    time_channels: int
    freq_shift: int
    flip_sin_to_cos: bool
    down_depth: tuple[int, ...]
    mid_depth: int
    up_depth: tuple[int, ...]
    cross_channels: int
    classes: int
    added_channels: int
    added_times: int


@dataclass(frozen=True)
class DiffusionConfig:
    beta_schedule: str
    beta_start: float
    beta_end: float
    num_diffusion_timesteps: int


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = 128
    dropout: float = 0.0
    ema_rate: float = 0.9999


@dataclass(frozen=True)
class OptimConfig:
    weight_decay: float = 0.0
    lr: float = 2e-4
    beta1: float = 0.9
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass(frozen=True)
class Config:
    """A network, its diffusion process, and how it is trained, which matters for training alone. What a `latent` network makes
    is no picture before an autoencoder has decoded it."""

    architecture: Architecture
    diffusion: DiffusionConfig
    latent: bool = False
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.architecture.in_channels, self.architecture.height, self.architecture.width)


def config_to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def stored_config(tree: Any, source: str) -> Config:
    """The inverse of `config_to_dict`; `source` names the origin in errors. Raises InputError for what no network can have."""
    config: Config = build(Config, tree, source)
    check_config(config, source)
    return config


def model_fingerprint(config: Config) -> str:
    """SHA-256 over what decides the network and its diffusion process (not training options)."""
    parts = {"architecture": dataclasses.asdict(config.architecture), "diffusion": dataclasses.asdict(config.diffusion)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_config(config: Config, source: str) -> None:
    """Raises InputError naming the first thing that no network, or no diffusion process, can have."""

    def check(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"{source}: {message}")

    a = config.architecture
    levels = len(a.channels)
    check(0 < levels <= MOST_LEVELS, f"a network has 1 to {MOST_LEVELS} levels, not {levels}")
    for name in ("layers", "down_heads", "up_heads", "down_sampling", "up_sampling", "down_depth", "up_depth"):
        check(len(getattr(a, name)) == levels, f"'{name}' must have an entry for each of the {levels} levels")
    check(a.groups > 0 and all(0 < width <= MOST_CHANNELS for width in a.channels), "channels and groups must be positive")
    check(not any(width % a.groups for width in (a.base, *a.channels)), f"channels must be multiples of the {a.groups} groups")
    check(0 < a.base <= MOST_CHANNELS and a.base % 2 == 0, "the base channels must be even: half are sines")
    check(all(0 < count <= MOST_LAYERS for count in a.layers), f"a level has 1 to {MOST_LAYERS} layers")
    check(0 < a.in_channels <= MOST_CHANNELS and 0 < a.out_channels <= MOST_CHANNELS, "an image has at least one channel")
    for side, heads, widths in (("down", a.down_heads, a.channels), ("up", a.up_heads, a.channels[::-1])):
        for width, count in zip(widths, heads, strict=True):
            check(count >= 0 and width % max(count, 1) == 0, f"{width} channels of the way {side} have no {count} heads")
    check(a.mid_heads >= 0 and a.channels[-1] % max(a.mid_heads, 1) == 0, f"the middle cannot have {a.mid_heads} heads")
    factor = 2 ** (levels - 1)
    for size in (a.height, a.width):
        check(0 < size <= LARGEST_IMAGE and size % factor == 0, f"an image size of {size} is not divisible by {factor}")
    check(a.down_padding in (0, 1), f"'down_padding' must be 0 or 1, found {a.down_padding}")
    check(0 < a.time_channels <= MOST_CHANNELS and a.freq_shift in (0, 1), "the time embedding must have channels")
    depths = (*a.down_depth, a.mid_depth, *a.up_depth)
    check(all(0 <= depth <= MOST_LAYERS for depth in depths), f"an attention has 0 to {MOST_LAYERS} transformer blocks")
    check(0 <= a.cross_channels <= MOST_CHANNELS, "a prompt has no negative number of channels")
    check(not any(depths) or a.cross_channels > 0, "transformer blocks need a prompt's number of channels")
    check(0 <= a.classes <= MOST_CHANNELS, f"'classes' must lie between 0 and {MOST_CHANNELS}")
    check(a.added_times >= 0 and a.added_channels <= MOST_CHANNELS, "'added_times' and 'added_channels' must be sizes")
    room = a.added_channels - TIME_IDS * a.added_times
    check(room > 0 or room == a.added_channels == 0, f"'added_channels' must be more than {TIME_IDS} times 'added_times'")
    check(a.added_times % 2 == 0, "'added_times' must be even: half are sines")
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


def refuse_unknown(source: str, prefix: str, key: Any, value: Any, known: list[str]) -> None:
    """What `build` does with a key that its class does not have."""
    name = f"{prefix}{shown(key)[1:-1] if isinstance(key, str) else shown(key)}"
    raise InputError(f"{source}: unknown key '{name}'; known keys here: {', '.join(known)}")


def build(cls: Any, tree: Any, source: str, prefix: str = "", unknown: Callable[..., None] = refuse_unknown) -> Any:
    """A dataclass from nested dictionaries (YAML or JSON). Raises InputError naming the first missing or ill-typed key;
    `unknown` is called for every other one."""
    if not isinstance(tree, dict):
        raise InputError(
            f"{source}: '{prefix.rstrip('.') or 'the file'}' must be a mapping of keys, found {type(tree).__name__}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key not in fields:
            unknown(source, prefix, key, value, sorted(fields))
    values = {}
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name in tree:
            values[name] = _convert(tree[name], hints[name], source, key=prefix + name, unknown=unknown)
        elif required:
            raise InputError(f"{source}: missing key '{prefix}{name}'")
    return cls(**values)


def _convert(value: Any, hint: Any, source: str, key: str, unknown: Callable[..., None]) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, source, prefix=key + ".", unknown=unknown)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else None
        if inner is Resampling and items is not None and all(i in list(Resampling) for i in items):
            return tuple(Resampling(i) for i in items)
        if inner is not int or items is None or not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
            raise InputError(
                f"{source}: '{key}' must be a list of {'integers' if inner is int else 'words'}, found {shown(value)}"
            )
        return tuple(items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-8 as a string
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif type(value) is hint:
        return value
    raise InputError(f"{source}: '{key}' must be of type {hint.__name__}, found {shown(value)}")
