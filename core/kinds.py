"""The kinds that options and files name by a word, each in one place. No torch."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from modiff_trt.core.errors import InputError, shown


class Mode(StrEnum):
    """How a layer is computed: modulated with state (MoDiff), integers without state (Q-Diffusion), or unquantized."""

    MODIFF = "modiff"
    INT8 = "int8"
    FLOAT = "float"


class Modes(StrEnum):
    """Which layers have which mode: by the recipe alone, or chosen by trial and by what each mode costs."""

    RECIPE = "recipe"
    AUTO = "auto"


class Method(StrEnum):
    """What a network was calibrated for."""

    MODIFF = "modiff"
    QDIFF = "qdiff"


class Granularity(StrEnum):
    """What an activation grid belongs to: the layer (baked), each image (LTQ), or each input channel of each image (LCQ)."""

    STATIC = "static"
    TENSOR = "tensor"
    CHANNEL = "channel"


class Start(StrEnum):
    """How a trajectory begins: with warm-up rows, or with a full-precision first step (the paper's; simulation only)."""

    WARMUP = "warmup"
    EXACT = "exact"


class SolverKind(StrEnum):
    """What moves the image: DDIM, or DPM-Solver++ of second order in its multistep form."""

    DDIM = "ddim"
    DPMPP_2M = "dpmpp-2m"


class Spacing(StrEnum):
    """How timesteps are spaced: as in DDIM's code, as in diffusers' schedulers, or by the signal-to-noise ratio."""

    QUAD = "quad"
    UNIFORM = "uniform"
    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"
    LOGSNR = "logsnr"


class Prediction(StrEnum):
    """What the network says: the noise, the velocity (arXiv 2202.00512), or the sample."""

    EPSILON = "epsilon"
    V = "v"
    SAMPLE = "sample"


class FinalAlpha(StrEnum):
    """Where DDIM's last step arrives: at alpha-bar 1, or at that of the first timestep."""

    ONE = "one"
    FIRST = "first"


class ScaleMethod(StrEnum):
    """How the step of a grid is found from the values that it must hold."""

    MINMAX = "minmax"
    MSE = "mse"
    PERCENTILE = "percentile"
    LEARNED = "learned"


class Residuals(StrEnum):
    """What residuals are measured against: the step before of the float network, or the quantized network's a_hat."""

    FLOAT = "float"
    QUANTIZED = "quantized"


class Rounding(StrEnum):
    """How weights are rounded."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class Search(StrEnum):
    """What is searched by trial trajectories; `auto` is `rows` where the activations limit the image."""

    NONE = "none"
    AUTO = "auto"
    SCALES = "scales"
    ROWS = "rows"


# What a manifest has in place of a method where the network is not quantized.
UNQUANTIZED = "float"

K = TypeVar("K", bound=StrEnum)


def chosen(kind: type[K], value: str, option: str) -> K:
    """The member that `value` names. Raises InputError with the words that `option` takes."""
    if value not in tuple(kind):
        raise InputError(f"{option} must be one of {', '.join(kind)}, found {shown(str(value))}")
    return kind(value)


class Resampling(StrEnum):
    """How a level's image is halved or doubled: a convolution, a residual block, or averages and copies alone."""

    CONV = "conv"
    RESNET = "resnet"
    PLAIN = "plain"
