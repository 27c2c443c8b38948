"""The row table: one row per pass of the engine, with its timestep and one multiplier per modulated layer.

A table begins with `warmup` rows at the first timestep, which only bring the state up and do not move the image,
then has one row per DDIM step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modiff_trt.core.grid import grid_max
from modiff_trt.core.kinds import Start, chosen
from modiff_trt.core.manifest import NetworkManifest, decode_array

LONGEST_WARMUP = 4


@dataclass(frozen=True)
class RowTable:
    """`t` [R] int64, `multipliers` [R, L] float32, the number of warm-up rows, and whether row 0 is unrounded."""

    t: np.ndarray[Any, np.dtype[np.int64]]
    multipliers: np.ndarray[Any, np.dtype[np.float32]]
    warmup: int = 0
    exact_start: bool = False

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The DDIM sequence, noisiest first, without the warm-up rows."""
        return tuple(int(t) for t in self.t[self.warmup :])

    def __len__(self) -> int:
        return len(self.t)


def rows_of_manifest(manifest: NetworkManifest) -> RowTable | None:
    """The row table that an exported network was calibrated with; None for a float network, which takes any timesteps."""
    if "timesteps" not in manifest:
        return None
    warmup, steps = manifest["warmup"], manifest["timesteps"]
    t = np.asarray([steps[0]] * warmup + steps, np.int64)
    return RowTable(t, decode_array(manifest["multipliers"]).reshape(len(t), len(manifest["modulated"])), warmup)


def plain_rows(timesteps: tuple[int, ...]) -> RowTable:
    """One row per step and no multipliers: for networks without state."""
    return RowTable(np.asarray(timesteps, np.int64), np.zeros((len(timesteps), 0), np.float32))


def modulated_rows(
    timesteps: tuple[int, ...],
    full_range: np.ndarray[Any, Any],
    bits: np.ndarray[Any, Any],
    start: Start,
) -> RowTable:
    """Rows for MoDiff with one static scale per layer.

    `full_range` [L] is the ratio of each layer's grid step for its whole activation at the first timestep to its
    baked residual scale. With start `warmup`, row 0 has that grid and each warm-up row one 1/Q as coarse as the row
    before (which leaves residuals of at most half its own step), but never finer than the running grid, where all layers
    end: a finer one would leave a_hat too close to its input (see `dither`). With start `exact` the first step is not
    rounded.
    """
    start, ladder = chosen(Start, start, "--start"), []
    if start == Start.WARMUP:
        top = np.asarray([grid_max(int(b)) for b in bits], np.float32)
        ladder.append(np.maximum(full_range, 1))
        while len(ladder) < LONGEST_WARMUP and (ladder[-1] > 1).any():
            ladder.append(np.maximum(ladder[-1] / top, 1))
    return rows_after(ladder, timesteps, len(full_range), exact_start=start == Start.EXACT)


def rows_after(
    warmup: list[np.ndarray[Any, Any]], timesteps: tuple[int, ...], layers: int, *, exact_start: bool = False
) -> RowTable:
    """A table of these warm-up multipliers, [layers] each, at the first timestep, then ones for every DDIM step."""
    t = np.asarray([timesteps[0]] * len(warmup) + list(timesteps), np.int64)
    multipliers = np.ones((len(t), layers), np.float32)
    if warmup:
        multipliers[: len(warmup)] = np.stack(warmup)
    return RowTable(t, multipliers, len(warmup), exact_start=exact_start)
