"""The diffusion process: how much signal is left at each timestep. In float64, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from modiff_trt.core.config import DiffusionConfig

Array = np.ndarray[Any, np.dtype[np.float64]]


def betas(config: DiffusionConfig) -> Array:
    """The noise schedule [T], float64, by the names that DDIM's configuration files use."""
    start, end, steps = config.beta_start, config.beta_end, config.num_diffusion_timesteps
    if config.beta_schedule == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if config.beta_schedule == "quad":
        return np.asarray(np.linspace(start**0.5, end**0.5, steps) ** 2)
    if config.beta_schedule == "const":
        return np.full(steps, end, np.float64)
    if config.beta_schedule == "jsd":
        return 1.0 / np.arange(steps, 0, -1, dtype=np.float64)
    sigmoid = 1.0 / (1.0 + np.exp(-np.linspace(-6, 6, steps)))
    return np.asarray(start + (end - start) * sigmoid)


def alphas_cumprod(config: DiffusionConfig) -> Array:
    """alpha-bar [T], float64."""
    return np.asarray(np.cumprod(1.0 - betas(config)), np.float64)
