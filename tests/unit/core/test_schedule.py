import numpy as np
import pytest
import torch
from reference import linear_alpha_bar, reference_ddim

from modiff_trt.core.config import DiffusionConfig
from modiff_trt.core.errors import InputError
from modiff_trt.core.schedule import alphas_cumprod, betas, ddim_steps, timestep_sequence

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
    assert timestep_sequence(LINEAR, 10, "uniform") == tuple(range(900, -1, -100))
    # 1000 // 300 = 3, so DDIM's own code visits 334 steps
    assert len(timestep_sequence(LINEAR, 300, "uniform")) == 334
    quad = timestep_sequence(LINEAR, 50, "quad")
    assert quad == tuple(int(s) for s in reversed(np.linspace(0, np.sqrt(800), 50) ** 2))
    assert len(quad) == 50 and quad[-1] == 0 and quad[0] in (799, 800)
    assert timestep_sequence(LINEAR, 100, "quad").count(0) == 4  # repeated, as in DDIM


@pytest.mark.parametrize(("steps", "skip"), [(0, "quad"), (1001, "quad"), (10, "cosine")])
def test_bad_sequences(steps, skip):
    with pytest.raises(InputError):
        timestep_sequence(LINEAR, steps, skip)


@pytest.mark.parametrize("skip", ["uniform", "quad"])
def test_eta_zero_equals_the_predicted_x0_form(skip):
    timesteps = timestep_sequence(LINEAR, 20, skip)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def eps_fn(x, t):
        return torch.tanh(x) * (1 + t / 1000)

    expected = reference_ddim(eps_fn, x, list(reversed(timesteps)), linear_alpha_bar())
    for step in ddim_steps(alphas_cumprod(LINEAR), timesteps, 0.0):
        x = step.x_coef * x + step.eps_coef * eps_fn(x, step.t)
        assert step.noise_coef == 0.0
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_eta_keeps_the_variance_of_ddim():
    alpha_bar, timesteps = alphas_cumprod(LINEAR), timestep_sequence(LINEAR, 10, "uniform")
    for step, after, full in zip(
        ddim_steps(alpha_bar, timesteps, 0.5), timesteps[1:], ddim_steps(alpha_bar, timesteps, 1.0), strict=False
    ):
        a, b = alpha_bar[step.t], alpha_bar[after]
        sigma = 0.5 * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)  # eq. 16
        assert step.noise_coef == pytest.approx(sigma, rel=1e-12)
        assert full.noise_coef == pytest.approx(2 * sigma, rel=1e-12)
        # the noise in x splits into the predicted direction and fresh noise of total variance 1 - b
        direction = step.eps_coef + step.x_coef * np.sqrt(1 - a)
        assert direction**2 + sigma**2 == pytest.approx(1 - b, rel=1e-9)
    with pytest.raises(InputError):
        ddim_steps(alpha_bar, timesteps, 1.5)
