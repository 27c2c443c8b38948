"""The integer grid of symmetric quantization. No torch, so that a deployed sampler can use it."""

from __future__ import annotations

MIN_BITS, MAX_BITS = 2, 8
# No step is smaller, so that a tensor of zeros can be divided by its own.
SMALLEST_SCALE = 1e-8


def grid_max(bits: int) -> int:
    """The largest integer of a grid of 2 to 8 bits, Q = 2^(bits-1) - 1; the smallest is -Q - 1."""
    return (1 << (bits - 1)) - 1
