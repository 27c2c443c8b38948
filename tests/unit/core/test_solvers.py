"""Rows of numbers against diffusers' own schedulers: whole trajectories in float64."""

import itertools

import numpy as np
import pytest
import torch

from modiff_trt.core.config import DiffusionConfig
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import FinalAlpha, Prediction, SolverKind, Spacing
from modiff_trt.core.solvers import Solver, solver_from_dict

diffusers = pytest.importorskip("diffusers")

CONFIG = DiffusionConfig("linear", 1e-4, 0.02, 1000)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
NAMES = {Prediction.EPSILON: "epsilon", Prediction.V: "v_prediction", Prediction.SAMPLE: "sample"}
SPACINGS = (Spacing.LEADING, Spacing.TRAILING, Spacing.LINSPACE)


def answer(x, t):
    """A smooth stand-in for a network, which depends on x and on the timestep, element by element."""
    return torch.sin(1.3 * x + t / 200) * (0.5 + t / 2000)


def wide(scheduler):
    """The scheduler with its constants in float64: diffusers makes them in float32."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if hasattr(scheduler, "final_alpha_cumprod") and scheduler.final_alpha_cumprod != 1:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def by_diffusers(scheduler, steps, x, **options):
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    for t in scheduler.timesteps:
        x = scheduler.step(answer(x, int(t)), t, x, **options).prev_sample
    return timesteps, x


def by_numbers(solver, steps, x, noises=None, eta=0.0):
    timesteps = solver.timesteps(CONFIG, steps)
    u = solver.updates(CONFIG, timesteps, eta)
    before = torch.zeros_like(x)
    for i, t in enumerate(timesteps):
        y = answer(x, t)
        x0 = u.p[i] * x + u.r[i] * y
        clipped = x0.clamp(-u.clip, u.clip) if u.clip is not None else x0
        x = u.x[i] * x + u.y[i] * y + u.b0[i] * (clipped - x0) + u.b1[i] * before
        if noises is not None:
            x = x + u.n[i] * noises[i]
        before = clipped
    return list(timesteps), x


def start():
    return torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("spacing", "prediction"), list(itertools.product(SPACINGS, NAMES)))
@pytest.mark.parametrize("steps", [1, 7, 50, 300])
@pytest.mark.parametrize(("final", "clip", "offset"), [("one", None, 0), ("first", 0.7, 1), ("first", None, 0)])
def test_ddim_is_diffusers(spacing, prediction, steps, final, clip, offset):
    offset = offset if spacing == Spacing.LEADING else 0
    solver = Solver(
        spacing=spacing, prediction=prediction, clip_sample=clip, steps_offset=offset, final_alpha=FinalAlpha(final)
    )
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        timestep_spacing=str(spacing),
        prediction_type=NAMES[prediction],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        steps_offset=offset,
        set_alpha_to_one=final == "one",
    )
    expected_steps, expected = by_diffusers(wide(scheduler), steps, start())
    timesteps, found = by_numbers(solver, steps, start())
    assert timesteps == expected_steps
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_ddim_with_noise_is_diffusers(eta, clip):
    scheduler = wide(diffusers.DDIMScheduler(**BETAS, clip_sample=clip is not None, clip_sample_range=clip or 1.0))
    scheduler.set_timesteps(20)
    noises = [torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    expected = start()
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        expected = scheduler.step(answer(expected, int(t)), t, expected, eta=eta, variance_noise=noise).prev_sample
    _, found = by_numbers(Solver(spacing=Spacing.LEADING, clip_sample=clip), 20, start(), noises, eta)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)


class DoubleDPM(diffusers.DPMSolverMultistepScheduler):
    """The original's formulas, kept in float64: it makes its sigmas, and the sample, float32."""

    def set_timesteps(self, steps, **options):
        super().set_timesteps(steps, **options)
        all_sigmas = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()
        sigmas = np.interp(self.timesteps.numpy(), np.arange(1000), all_sigmas)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0.0))

    def step(self, model_output, timestep, sample, **options):
        """As there, without the cast to float32 between (checked by the test's float32 case)."""
        if self.step_index is None:
            self._init_step_index(timestep)
        last = self.step_index == len(self.timesteps) - 1
        converted = self.convert_model_output(model_output, sample=sample)
        self.model_outputs = [*self.model_outputs[1:], converted]
        if self.config.solver_order == 1 or self.lower_order_nums < 1 or last:
            x = self.dpm_solver_first_order_update(converted, sample=sample)
        else:
            x = self.multistep_dpm_solver_second_order_update(self.model_outputs, sample=sample)
        self.lower_order_nums += self.lower_order_nums < self.config.solver_order
        self._step_index += 1
        return diffusers.schedulers.scheduling_utils.SchedulerOutput(prev_sample=x)


@pytest.mark.parametrize(("spacing", "prediction"), list(itertools.product(SPACINGS, NAMES)))
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20, 100])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_is_diffusers(spacing, prediction, steps, order):
    options = BETAS | {
        "solver_order": order,
        "prediction_type": NAMES[prediction],
        "timestep_spacing": str(spacing),
        "final_sigmas_type": "zero",
    }
    solver = Solver(SolverKind.DPMPP_2M, spacing, prediction, order=order)
    timesteps, found = by_numbers(solver, steps, start())
    expected_steps, expected = by_diffusers(wide(DoubleDPM(**options)), steps, start())
    assert timesteps == expected_steps
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)
    # The class as it is, which rounds to float32 in between.
    original_steps, original = by_diffusers(diffusers.DPMSolverMultistepScheduler(**options), steps, start())
    assert timesteps == original_steps
    torch.testing.assert_close(found, original.double(), rtol=2e-3, atol=2e-4)


def test_quad_and_uniform_are_ddim_s_code():
    """From the code that the paper's authors published: both sequences, and the update of their `generalized_steps`."""
    for spacing, sequence in (
        (Spacing.UNIFORM, list(range(0, 1000, 1000 // 20))),
        (Spacing.QUAD, [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 20) ** 2]),
    ):
        timesteps, found = by_numbers(Solver(spacing=spacing), 20, start())
        assert timesteps == sequence[::-1]
        alpha_bar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)
        x = start()
        for t, after in zip(sequence[::-1], [*sequence[-2::-1], -1], strict=True):
            epsilon = answer(x, t)
            x0 = (x - epsilon * (1 - alpha_bar[t]) ** 0.5) / alpha_bar[t] ** 0.5
            x = alpha_bar[after] ** 0.5 * x0 + (1 - alpha_bar[after]) ** 0.5 * epsilon
        torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-12)


def test_the_second_solver_is_of_second_order():
    """Of Gaussian data everything is known: the best epsilon, and where the noise ends. DDIM's error halves with twice the
    steps, 2M's falls to a third at least, and is far smaller."""
    deviation, alpha_bar = 0.5, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    variance = alpha_bar * deviation**2 + 1 - alpha_bar

    def error(kind, steps):
        solver = Solver(kind, Spacing.LOGSNR)
        timesteps = solver.timesteps(CONFIG, steps)
        u, x, before = solver.updates(CONFIG, timesteps), 1.0, 0.0
        for i, t in enumerate(timesteps):
            y = np.sqrt(1 - alpha_bar[t]) * x / variance[t]
            x0 = u.p[i] * x + u.r[i] * y
            x, before = u.x[i] * x + u.y[i] * y + u.b1[i] * before, x0
        return abs(x - deviation / np.sqrt(variance[timesteps[0]]))

    ddim, second = ([error(kind, n) for n in (10, 20, 40)] for kind in (SolverKind.DDIM, SolverKind.DPMPP_2M))
    assert ddim[0] > 1.7 * ddim[1] > 1.7**2 * ddim[2]
    assert second[1] > 3 * second[2] and second[0] < 0.3 * ddim[0]


def test_logsnr_is_distinct_and_evenly_spaced():
    for steps in (2, 10, 33, 100, 900):
        found = Solver(SolverKind.DPMPP_2M, Spacing.LOGSNR).timesteps(CONFIG, steps)
        assert found[0] == 999 and found[-1] == 0 and list(found) == sorted(set(found), reverse=True)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    snr = np.log(np.sqrt(alpha_bar) / np.sqrt(1 - alpha_bar))[list(Solver(spacing=Spacing.LOGSNR).timesteps(CONFIG, 10))]
    assert np.abs(np.diff(snr) / np.diff(snr).mean() - 1).max() < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Solver(SolverKind.DPMPP_2M, Spacing.QUAD).timesteps(CONFIG, 100), "visit timestep [0-9]+ twice"),
        (lambda: Solver(SolverKind.DPMPP_2M, final_alpha=FinalAlpha.FIRST), "--final-alpha is for --solver ddim"),
        (lambda: Solver(SolverKind.DPMPP_2M).updates(CONFIG, (9, 3), 0.5), "--eta is for --solver ddim"),
        (lambda: Solver(steps_offset=1), "--steps-offset is for --spacing leading"),
        (lambda: Solver(spacing=Spacing.LEADING, steps_offset=1).timesteps(CONFIG, 1000), "begin at timestep 1000"),
        (lambda: Solver(spacing=Spacing.TRAILING).timesteps(CONFIG, 61), "61 steps with --spacing trailing end at timestep -1"),
        (lambda: Solver(clip_sample=-1.0), "--clip-sample must be positive"),
        (lambda: Solver(clip_sample=float("nan")), "--clip-sample must be positive"),
        (lambda: Solver().timesteps(CONFIG, 0), "--timesteps must lie between 1 and 1000"),
        (lambda: Solver().updates(DiffusionConfig("jsd", 1e-4, 0.02, 10), (9, 3)), "timestep 9 is pure noise"),
        (lambda: solver_from_dict(Solver().to_dict() | {"kind": "euler"}, "f"), "f names a solver"),
        (lambda: solver_from_dict(Solver().to_dict() | {"clip_sample": "1"}, "f"), "f names a solver"),
        (lambda: solver_from_dict([], "f"), "f names a solver"),
    ],
)
def test_what_is_no_such_table_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_files_carry_every_setting():
    solver = Solver(
        SolverKind.DDIM, Spacing.LEADING, Prediction.V, clip_sample=2.5, steps_offset=1, final_alpha=FinalAlpha.FIRST
    )
    import json

    for made in (solver, Solver(clip_sample=1)):  # a whole number, as Python code would write it
        assert solver_from_dict(json.loads(json.dumps(made.to_dict())), "f") == made
    said = "--solver ddim --timesteps 9 --spacing leading --prediction v --clip-sample 2.5 --steps-offset 1 --final-alpha first"
    assert solver.describe(9) == said


@pytest.mark.parametrize("solver", [Solver(), Solver(SolverKind.DPMPP_2M, Spacing.LOGSNR), Solver(prediction=Prediction.V)])
def test_sensitivity_is_what_a_wrong_answer_does_to_the_image(solver):
    """By running the updates once with each answer off by one."""
    timesteps = solver.timesteps(CONFIG, 9)
    updates = solver.updates(CONFIG, timesteps)
    answers = np.random.default_rng(0).standard_normal(len(timesteps))

    def final(answers):
        x, before = 0.7, 0.0
        for i, y in enumerate(answers):
            x0 = updates.p[i] * x + updates.r[i] * y
            x, before = updates.x[i] * x + updates.y[i] * y + updates.b1[i] * before, x0
        return x

    for i, found in enumerate(updates.sensitivity):
        off = answers.copy()
        off[i] += 1
        assert found == pytest.approx(final(off) - final(answers), rel=1e-9, abs=1e-12)
