"""Uniform affine quantizers in two forms that agree bit for bit: true int8 tensors, and their simulation in float.

Symmetric or asymmetric, one grid per tensor or per output channel (axis 0), fitted by min-max, MSE search or percentile.
Deployed layers use symmetric grids and one fixed zero point (`core.grid`); the general form is what the Q-Diffusion paper
calibrates with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.grid import MAX_BITS, MIN_BITS, SMALLEST_SCALE
from modiff_trt.networks.quantizers import MSE_POWER, Grid, search_ranges

FITS = ("minmax", "mse", "percentile")
PERCENTILE = 0.999
# torch.quantile refuses larger inputs; a larger tensor is sampled at a regular stride.
QUANTILE_LIMIT = 2**22


@dataclass(frozen=True)
class QuantizedTensor:
    """`values` int8, with the float32 `scale` and integer `zero_point` (scalars, or [C] along axis 0) of its grid."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """(values - zero_point) * scale, float32."""
        scale, zero = _along(self.scale, self.values), _along(self.zero_point, self.values)
        return (self.values.float() - zero) * scale


@dataclass(frozen=True)
class NativeINT8Quantizer:
    """A grid of 2 to 8 bits in an int8 container: x is near (q - zero_point) * scale, -2^(b-1) <= q < 2^(b-1)."""

    scale: Tensor
    zero_point: Tensor
    bits: int

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """True int8 values, kept so until they are used."""
        return QuantizedTensor(self._integers(x).to(torch.int8), self.scale, self.zero_point)

    def simulate(self, x: Tensor) -> Tensor:
        """The same rounding in float32: equal to `quantize(x).dequantize()` in every bit."""
        return (self._integers(x) - _along(self.zero_point, x)) * _along(self.scale, x)

    def _integers(self, x: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return ((x.float() / _along(self.scale, x)).round_() + _along(self.zero_point, x)).clamp_(-half, half - 1)


def fit_quantizer(
    x: Tensor, bits: int, *, symmetric: bool = True, per_channel: bool = False, fit: str = "minmax", power: float = MSE_POWER
) -> NativeINT8Quantizer:
    """Finds a grid for `x`; all channels at once when `per_channel`.

    `minmax` covers everything, `percentile` all but 0.1 % at each end, `mse` minimizes the mean of |error|^power over
    shrunken ranges (power 2, or 2.4 as Q-Diffusion does). Raises InputError for unknown settings or values not finite.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"bits must lie between {MIN_BITS} and {MAX_BITS}, found {bits}")
    if fit not in FITS:
        raise InputError(f"fit must be one of {', '.join(FITS)}, found '{fit}'")
    if not torch.isfinite(x).all():
        raise InputError("cannot fit a quantizer to NaN or infinite values")
    rows = x.float().flatten(1) if per_channel else x.float().reshape(1, -1)
    low, high = _percentiles(rows) if fit == "percentile" else (rows.amin(1), rows.amax(1))
    scale, zero = _grid(low, high, bits, symmetric=symmetric)
    if fit == "mse":
        scale, zero = _search(rows, low, high, bits=bits, symmetric=symmetric, power=power)
    if not per_channel:
        scale, zero = scale[0], zero[0]
    return NativeINT8Quantizer(scale, zero, bits)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    half = 2 ** (bits - 1)
    if symmetric:
        scale = (torch.maximum(low.abs(), high.abs()) / (half - 1)).clamp_min(SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero stays exact, so that padding is
    scale = ((high - low) / (2 * half - 1)).clamp_min(SMALLEST_SCALE)
    return scale, (-half - low / scale).round_().clamp_(-half, half - 1)


def _search(rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, power: float) -> tuple[Tensor, Tensor]:
    def error(grid: Grid) -> Tensor:
        return (NativeINT8Quantizer(grid[0], grid[1], bits).simulate(rows) - rows).abs_().pow_(power).mean(1)

    scale, zero = search_ranges(lambda share: _grid(low * share, high * share, bits, symmetric=symmetric), error)
    return scale, zero


def _percentiles(rows: Tensor) -> tuple[Tensor, Tensor]:
    stride = -(-rows.shape[1] * rows.shape[0] // QUANTILE_LIMIT)
    part = rows[:, ::stride]
    return torch.quantile(part, 1 - PERCENTILE, dim=1), torch.quantile(part, PERCENTILE, dim=1)


def _along(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter if parameter.ndim == 0 else parameter.reshape(-1, *[1] * (x.ndim - 1))
