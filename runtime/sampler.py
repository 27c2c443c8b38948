"""Sampling as a pure function over a denoiser: what a solver's numbers say, pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from modiff_trt.core.context import Arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.solvers import Updates
from modiff_trt.runtime.denoiser import Denoiser, OnDone, WholeTrajectory

OnPass = Callable[[int, Any, Any], None]


def sample_trajectory(
    denoiser: Denoiser,
    updates: Updates,
    x_start: np.ndarray[Any, Any],
    *,
    context: Arrays | None = None,
    draw_noise: Callable[[], np.ndarray[Any, Any]] | None = None,
    on_pass: OnPass | None = None,
    on_done: OnDone | None = None,
) -> np.ndarray[Any, Any]:
    """Runs one trajectory from `x_start` (x_T, float32 [N, C, H, W]) and returns x_0, same shape, not clipped.

    `updates` has the numbers of every row of the denoiser that is no warm-up. `context` is what the images are conditioned on
    (see `Denoiser.reset`). `draw_noise` supplies the fresh noise of each
    step and is required where they have any. `on_pass(row, x, y)` is called after every pass, warm-up passes included, with the
    backend's own arrays. `on_done(n)` is called when n more passes have ended. A backend that runs whole trajectories of these
    updates by itself does so where there is no `on_pass` and no noise. Raises InputError when the result is not
    finite.
    """
    if updates.draws_noise and draw_noise is None:
        raise ValueError("these updates need draw_noise")
    rows = denoiser.rows
    if len(updates) != len(rows) - rows.warmup:
        raise ValueError(f"{len(updates)} updates do not fit {len(rows) - rows.warmup} steps")
    if isinstance(denoiser, WholeTrajectory) and on_pass is None and denoiser.updates.equals(updates):
        return _finite(denoiser.trajectory(x_start, on_done, context))
    denoiser.reset(len(x_start), context)
    x, before = denoiser.from_host(x_start), None
    for row in range(len(rows)):
        y = denoiser(x, row)
        if on_pass is not None:
            on_pass(row, x, y)
        if on_done is not None:
            on_done(1)
        if row >= rows.warmup:
            x, before = step(updates, row - rows.warmup, x, y=y, before=before)
            if updates.draws_noise and draw_noise is not None:
                x = x + float(updates.n[row - rows.warmup]) * denoiser.from_host(draw_noise())
    return _finite(denoiser.to_host(x))


def step(updates: Updates, i: int, x: Any, y: Any, before: Any) -> tuple[Any, Any]:
    """(x', x0) of step i without its noise, on numpy arrays or torch tensors; x0 is None where no step needs it."""
    moved = float(updates.x[i]) * x + float(updates.y[i]) * y
    if updates.clip is None and not updates.looks_back:
        return moved, None
    x0 = float(updates.p[i]) * x + float(updates.r[i]) * y
    if updates.clip is not None:
        clipped = x0.clip(-updates.clip, updates.clip)
        moved, x0 = moved + float(updates.b0[i]) * (clipped - x0), clipped
    if before is not None and updates.b1[i] != 0:
        moved = moved + float(updates.b1[i]) * before
    return moved, x0


def _finite(result: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not np.isfinite(result).all():
        raise InputError("sampling produced NaN or infinite values; the scales do not fit, or the checkpoint is damaged")
    return result
