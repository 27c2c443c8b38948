"""Dither: a seeded offset within one grid step on every element of a_hat, from which a trajectory starts.

A residual under half a step rounds to zero. Where a_hat starts out equal to its input, that makes it lag behind, at
neighbouring and equal inputs in the same direction; where it starts from a random place inside the grid, the rounding
error does not depend on the input, and averages out over a convolution's inputs and over the steps. The offset is the
same for every image (so batches change nothing), and o_hat starts from the layer's answer to it, so nothing is biased.
No torch: every runtime must begin from the same numbers.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

# Half a step either way: the whole width of the grid.
WIDTH = 0.5
SEED = 0


def dither_offset(layer: str, shape: tuple[int, ...], step: float, upsampled: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 offsets [C, H, W] of one image, uniform in +-WIDTH `step`, decided by the layer's name alone.

    Of an `upsampled` input each 2x2 block gets one offset: its values are equal and stay so, and a runtime keeps one.
    """
    generator = np.random.Generator(np.random.Philox(key=[SEED, zlib.crc32(layer.encode())]))
    channels, height, width = shape
    drawn = (channels, height // 2, width // 2) if upsampled else shape
    uniform = generator.random(drawn, dtype=np.float32) * 2 - 1
    offsets = np.asarray(uniform * np.float32(WIDTH * step), np.float32)
    return offsets.repeat(2, axis=1).repeat(2, axis=2) if upsampled else offsets
