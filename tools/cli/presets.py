"""What a word of `--preset` stands for. Any option that is given itself overrides it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from modiff_trt.core.kinds import Rounding, Search


class Preset(StrEnum):
    """How much time calibration may take."""

    FAST = "fast"
    BALANCED = "balanced"
    EXACT = "exact"


@dataclass(frozen=True)
class Choices:
    """Of `calibrate`: how weights are rounded, what is searched by trial, and the images of a trial."""

    rounding: Rounding
    search: Search
    trial_images: int


PRESETS = {
    Preset.FAST: Choices(Rounding.NEAREST, Search.NONE, trial_images=2),
    Preset.BALANCED: Choices(Rounding.NEAREST, Search.AUTO, trial_images=4),
    Preset.EXACT: Choices(Rounding.ADAROUND, Search.AUTO, trial_images=8),
}
