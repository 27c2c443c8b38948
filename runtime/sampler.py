"""DDIM sampling (arXiv 2010.02502) as a pure function over a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from modiff_trt.core.errors import InputError
from modiff_trt.core.schedule import Array as Float64Array
from modiff_trt.core.schedule import ddim_steps
from modiff_trt.runtime.denoiser import Denoiser, OnDone, WholeTrajectory

OnPass = Callable[[int, Any, Any], None]


def ddim_sample(
    denoiser: Denoiser,
    alpha_bar: Float64Array,
    x_start: np.ndarray[Any, Any],
    *,
    eta: float = 0.0,
    draw_noise: Callable[[], np.ndarray[Any, Any]] | None = None,
    on_pass: OnPass | None = None,
    on_done: OnDone | None = None,
) -> np.ndarray[Any, Any]:
    """Runs one trajectory from `x_start` (x_T, float32 [N, C, H, W]) and returns x_0, same shape, not clipped.

    `draw_noise` supplies the fresh noise of each step and is required when eta > 0. `on_pass(row, x, eps)` is called
    after every pass, warm-up passes included, with the backend's own arrays. `on_done(n)` is called when n more passes have
    ended. A backend that runs whole trajectories by itself does so where there is no `on_pass` and no noise is drawn. Raises
    InputError when the result is not finite.
    """
    if eta == 0.0 and on_pass is None and isinstance(denoiser, WholeTrajectory):
        return _finite(denoiser.trajectory(x_start, on_done))
    rows = denoiser.rows
    steps = ddim_steps(alpha_bar, rows.timesteps, eta)
    if eta > 0 and draw_noise is None:
        raise ValueError("eta > 0 needs draw_noise")
    denoiser.reset(len(x_start))
    x = denoiser.from_host(x_start)
    for row in range(len(rows)):
        eps = denoiser(x, row)
        if on_pass is not None:
            on_pass(row, x, eps)
        if on_done is not None:
            on_done(1)
        if row < rows.warmup:
            continue
        step = steps[row - rows.warmup]
        x = step.x_coef * x + step.eps_coef * eps
        if step.noise_coef != 0.0 and draw_noise is not None:
            x = x + step.noise_coef * denoiser.from_host(draw_noise())
    return _finite(denoiser.to_host(x))


def _finite(result: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not np.isfinite(result).all():
        raise InputError("sampling produced NaN or infinite values; the scales do not fit, or the checkpoint is damaged")
    return result
