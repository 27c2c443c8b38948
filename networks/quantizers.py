"""Uniform quantization: grids, int8 weights, and scales found by min-max or by MSE search.

A grid of `bits` has the integers -2^(bits-1) .. 2^(bits-1)-1 in an int8 container, 2 <= bits <= 8, and a zero point, which is 0
but for activations that are hardly negative (`core.grid`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff_trt.core.grid import SMALLEST_SCALE, grid_ends, grid_max
from modiff_trt.core.kinds import ScaleMethod

# Q-Diffusion and its predecessors weigh errors by a power slightly above 2 when they search for a scale. For activations of
# layers without state it is worth 3 dB of the image more than 2 is; 3 is worth less, but at 6 bits (docs/lab/modes.md).
MSE_POWER = 2.4
# Ranges that a search tries.
CANDIDATES = 80
Grid = tuple[Tensor, ...]


def quantize(x: Tensor, scale: Tensor | float, bits: int, zero_point: int = 0) -> Tensor:
    """clip(rint(x / scale)), which is q - zero_point, as integers in x's own dtype. Rounds half to even, like ONNX and
    TensorRT."""
    return (x / scale).round_().clamp_(*grid_ends(bits, zero_point))


def minmax_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """Per-output-channel scale [C_out] that maps the largest magnitude of each channel onto Q."""
    return (weight.abs().flatten(1).amax(1) / grid_max(bits)).clamp_min(SMALLEST_SCALE)


def search_ranges(grid: Callable[[float], Grid], error: Callable[[Grid], Tensor]) -> Grid:
    """The grid of the smallest error among ranges from the full one (`grid(1.0)`) down to a fifth of it, for each channel by
    itself: `error` gives [C], and a grid is a tuple of tensors [C]."""
    best = grid(1.0)
    least = torch.full_like(best[0], math.inf)
    for i in range(CANDIDATES):
        tried = grid(1 - i / (CANDIDATES * 1.25))
        found = error(tried)
        better = found < least
        best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
        least = torch.where(better, found, least)
    return best


def mse_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """Per-output-channel scale [C_out] minimizing sum |w - Q(w)|^2.4 over shrunken ranges, all channels at once."""
    full, flat = minmax_weight_scale(weight, bits), weight.flatten(1)

    def error(grid: Grid) -> Tensor:
        return (flat - quantize_weight(flat, grid[0], bits) * grid[0][:, None]).abs().pow_(MSE_POWER).sum(1)

    return search_ranges(lambda share: (full * share,), error)[0]


def quantize_weight(weight: Tensor, scale: Tensor, bits: int, round_up: Tensor | None = None) -> Tensor:
    """Rounds to -Q..Q per output channel, as integers in the weight's dtype (-Q-1 is never used).

    To nearest, or down and up as the booleans `round_up` (shape of the weight) say.
    """
    q = grid_max(bits)
    cells = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
    cells = cells.round_() if round_up is None else cells.floor_() + round_up
    return cells.clamp_(-q, q)


def pack_rounding(round_up: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Booleans as packed bits, for a scales file."""
    return np.packbits(round_up.flatten().cpu().numpy())


def unpack_rounding(packed: np.ndarray[Any, np.dtype[np.uint8]] | None, weight: Tensor) -> Tensor | None:
    """The inverse of `pack_rounding`, in the shape and on the device of `weight`."""
    if packed is None:
        return None
    bits = np.unpackbits(packed, count=weight.numel()).reshape(tuple(weight.shape))
    return torch.from_numpy(bits).to(weight.device, torch.bool)


COUNTABLE = 2**24


class RangeHistogram:
    """Magnitudes of a stream of tensors in constant memory: exact maximum, and a histogram whose range doubles."""

    BINS = 2048

    def __init__(self) -> None:
        self.absmax = 0.0
        self._range = 0.0
        self._counts = torch.zeros(self.BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        magnitude = x.abs().flatten()
        top = float(magnitude.max())
        self.absmax = max(self.absmax, top)
        if top == 0.0:
            self._counts[0] += magnitude.numel()
            return
        if self._range == 0.0:
            self._range = top
        while top > self._range:
            self._counts = torch.cat([self._counts.reshape(-1, 2).sum(1), torch.zeros(self.BINS // 2, dtype=torch.float64)])
            self._range *= 2
        # histc counts in float32, which stops at 2^24 in a bin.
        for part in magnitude.float().split(COUNTABLE):
            self._counts += torch.histc(part, self.BINS, 0, self._range).double().cpu()

    def to_array(self) -> np.ndarray[Any, Any]:
        """float64 [2 + BINS]: the maximum, the range, the counts."""
        return np.concatenate([[self.absmax, self._range], self._counts.numpy()])

    @classmethod
    def from_array(cls, kept: np.ndarray[Any, Any]) -> RangeHistogram:
        """What `to_array` kept. Raises ValueError."""
        if kept.shape != (2 + cls.BINS,):
            raise ValueError(f"a histogram has {2 + cls.BINS} numbers, not {kept.shape}")
        found = cls()
        found.absmax, found._range = float(kept[0]), float(kept[1])
        found._counts = torch.from_numpy(kept[2:].astype(np.float64))
        return found

    def minmax_scale(self, bits: int, zero_point: int = 0) -> float:
        return max(self.absmax / grid_ends(bits, zero_point)[1], SMALLEST_SCALE)

    def mse_scale(self, bits: int, zero_point: int = 0, candidates: int = 200) -> float:
        """The scale minimizing the mean of |x - Q(x)|^2.4 among ranges from the full one down to a hundredth of it."""
        q = grid_ends(bits, zero_point)[1]
        if self.absmax == 0.0:
            return SMALLEST_SCALE
        width = self._range / self.BINS
        centers = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * width
        scales = self.absmax / q * torch.logspace(0, -2, candidates, dtype=torch.float64)[:, None]
        error = centers - (centers / scales).round().clamp(max=q) * scales
        cost = (error.abs().pow_(MSE_POWER) * self._counts).sum(1)
        return max(float(scales[int(cost.argmin()), 0]), SMALLEST_SCALE)

    def percentile_scale(self, bits: int, percentile: float, zero_point: int = 0) -> float:
        """The scale of the range that holds this share of the magnitudes, to the width of a bin."""
        share = self._counts.cumsum(0) / self._counts.sum().clamp_min(1)
        upper = (int((share < percentile).sum()) + 1) * self._range / self.BINS
        return max(min(upper, self.absmax) / grid_ends(bits, zero_point)[1], SMALLEST_SCALE)

    def scale(self, method: ScaleMethod, bits: int, percentile: float, zero_point: int = 0) -> float:
        """The scale by this method, of a grid that clips nothing below its zero point; `learned` scales start from min-max (see
        `export.calibration.residuals`)."""
        if method == ScaleMethod.PERCENTILE:
            return self.percentile_scale(bits, percentile, zero_point)
        if method == ScaleMethod.MSE:
            return self.mse_scale(bits, zero_point)
        if method in (ScaleMethod.MINMAX, ScaleMethod.LEARNED):
            return self.minmax_scale(bits, zero_point)
        raise ValueError(f"no search for {method!r}")

    def coarse(self, bins: int = 64) -> tuple[Tensor, float]:
        """Shares [bins] of the magnitudes over 0..range, and the range, for plots."""
        counts = self._counts.reshape(bins, -1).sum(1)
        return counts / counts.sum().clamp_min(1), self._range
