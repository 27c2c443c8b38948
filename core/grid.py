"""The integer grids of quantization: x is near step * (q - zero point). No torch, so that a deployed sampler can use them.

Weights, residuals and the inputs of most layers have a zero point of 0. Inputs that are hardly negative, such as SiLU's, which
are never below -0.28, have a low one: a symmetric grid would leave nearly half of its integers unused.
"""

from __future__ import annotations

MIN_BITS, MAX_BITS = 2, 8
# No step is smaller, so that a tensor of zeros can be divided by its own.
SMALLEST_SCALE = 1e-8


def grid_max(bits: int) -> int:
    """The largest integer of a grid of 2 to 8 bits, Q = 2^(bits-1) - 1; the smallest is -Q - 1."""
    return (1 << (bits - 1)) - 1


def low_zero_point(bits: int) -> int:
    """The zero point of a grid with an eighth of its 2^bits integers below it (at least one), and all others from it on."""
    return max(1, (1 << bits) // 8) - (1 << (bits - 1))


def grid_ends(bits: int, zero_point: int = 0) -> tuple[int, int]:
    """The lowest and the highest number of steps that a grid reaches, as seen from its zero point."""
    return -grid_max(bits) - 1 - zero_point, grid_max(bits) - zero_point
