from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import linear_alpha_bar, reference_ddim

from modiff_trt.core.config import DiffusionConfig
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Spacing
from modiff_trt.core.schedule import alphas_cumprod, betas
from modiff_trt.core.solvers import Solver

LINEAR = DiffusionConfig("linear", 1e-4, 0.02, 1000)


def test_alpha_bar_is_float64_and_exact():
    alpha_bar = alphas_cumprod(LINEAR)
    assert alpha_bar.dtype == np.float64
    np.testing.assert_allclose(alpha_bar, linear_alpha_bar(), rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "quad", "const", "jsd", "sigmoid"])
def test_schedules_stay_in_range(schedule):
    b = betas(DiffusionConfig(schedule, 1e-4, 0.02, 100))
    assert b.shape == (100,) and (b > 0).all() and (b <= 1).all() and b.dtype == np.float64


def test_sequences_are_those_of_ddim():
    uniform, quadratic = Solver(spacing=Spacing.UNIFORM), Solver(spacing=Spacing.QUAD)
    assert uniform.timesteps(LINEAR, 10) == tuple(range(900, -1, -100))
    # 1000 // 300 = 3, so DDIM's own code visits 334 steps
    assert len(uniform.timesteps(LINEAR, 300)) == 334
    quad = quadratic.timesteps(LINEAR, 50)
    assert quad == tuple(int(s) for s in reversed(np.linspace(0, np.sqrt(800), 50) ** 2))
    assert len(quad) == 50 and quad[-1] == 0 and quad[0] in (799, 800)
    assert quadratic.timesteps(LINEAR, 100).count(0) == 4  # repeated, as in DDIM


@pytest.mark.parametrize("spacing", [Spacing.UNIFORM, Spacing.QUAD])
def test_eta_zero_equals_the_predicted_x0_form(spacing):
    solver = Solver(spacing=spacing)
    timesteps = solver.timesteps(LINEAR, 20)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def eps_fn(x, t):
        return torch.tanh(x) * (1 + t / 1000)

    expected = reference_ddim(eps_fn, x, list(reversed(timesteps)), linear_alpha_bar())
    updates = solver.updates(LINEAR, timesteps)
    for i, t in enumerate(timesteps):
        x = updates.x[i] * x + updates.y[i] * eps_fn(x, t)
    assert not updates.draws_noise
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_eta_keeps_the_variance_of_ddim():
    solver, alpha_bar = Solver(spacing=Spacing.UNIFORM), alphas_cumprod(LINEAR)
    timesteps = solver.timesteps(LINEAR, 10)
    half, full = (solver.updates(LINEAR, timesteps, eta) for eta in (0.5, 1.0))
    for i, (t, after) in enumerate(pairwise(timesteps)):
        a, b = alpha_bar[t], alpha_bar[after]
        sigma = 0.5 * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)  # eq. 16
        assert half.n[i] == pytest.approx(sigma, rel=1e-12)
        assert full.n[i] == pytest.approx(2 * sigma, rel=1e-12)
        # the noise in x splits into the predicted direction and fresh noise of total variance 1 - b
        direction = half.y[i] + half.x[i] * np.sqrt(1 - a)
        assert direction**2 + sigma**2 == pytest.approx(1 - b, rel=1e-9)
    with pytest.raises(InputError):
        solver.updates(LINEAR, timesteps, 1.5)
