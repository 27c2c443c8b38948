"""The diffusion process and DDIM's timesteps and coefficients (arXiv 2010.02502), in float64. No torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from modiff_trt.core.config import DiffusionConfig
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.kinds import SkipType, chosen

Array = np.ndarray[Any, np.dtype[np.float64]]

log = logging.getLogger(__name__)


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


def timestep_sequence(config: DiffusionConfig, steps: int, skip_type: SkipType) -> tuple[int, ...]:
    """The timesteps visited, in the order of sampling (noisiest first), exactly as DDIM's code chooses them.

    `quad` repeats the smallest timesteps when `steps` is large; they are kept, as there, and change nothing.
    """
    total, skip_type = config.num_diffusion_timesteps, chosen(SkipType, skip_type, "--skip-type")
    if not 1 <= steps <= total:
        raise InputError(f"--timesteps must lie between 1 and {total}, found {shown(steps)}")
    if skip_type == SkipType.UNIFORM:
        sequence = list(range(0, total, total // steps))
    else:
        sequence = [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), steps) ** 2]
    return tuple(reversed(sequence))


def requested_sequence(config: DiffusionConfig, steps: int, skip_type: SkipType) -> tuple[int, ...]:
    """The timesteps of as many steps as were asked for. Where the schedule turns them into another number, the log says so."""
    sequence = timestep_sequence(config, steps, skip_type)
    if len(sequence) != steps:
        total = config.num_diffusion_timesteps
        log.info(
            "%d steps with --skip-type %s become %d: every %s of %d timesteps, as in DDIM's code",
            *(steps, skip_type, len(sequence), "one" if total // steps == 1 else f"{total // steps}th", total),
        )
    return sequence


@dataclass(frozen=True)
class DDIMStep:
    """x_next = x * x_coef + eps * eps_coef + noise * noise_coef (eq. 12 of DDIM)."""

    t: int
    x_coef: float
    eps_coef: float
    noise_coef: float


def ddim_steps(alpha_bar: Array, timesteps: tuple[int, ...], eta: float) -> tuple[DDIMStep, ...]:
    """One update per timestep, the last one arriving at alpha-bar = 1. eta 0 is deterministic, 1 is DDPM-like."""
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"--eta must lie between 0 and 1, found {eta}")
    steps = []
    for i, t in enumerate(timesteps):
        now = alpha_bar[t]
        after = alpha_bar[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        if now == 0:
            raise InputError(f"timestep {t} is pure noise in this beta_schedule, and DDIM divides by its signal; use fewer")
        sigma = eta * np.sqrt((1 - now / after) * (1 - after) / (1 - now))
        x_coef = np.sqrt(after / now)
        eps_coef = np.sqrt(1 - after - sigma**2) - np.sqrt((1 - now) * after / now)
        steps.append(DDIMStep(t, float(x_coef), float(eps_coef), noise_coef=float(sigma)))
    return tuple(steps)
