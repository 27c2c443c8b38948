"""Solvers as numbers: what the answer of each pass does to the image. In float64, without torch.

    x0 = p x + r y                                          y is what the network says: epsilon, v, or the sample
    x' = X x + Y y + b0 (clip(x0) - x0) + b1 x0_before + n noise

X and Y hold all that x0 adds where it is not clipped, so that the update of most schedules is one pass over x. DDIM (arXiv
2010.02502, eq. 12) with any eta is such a table. So is DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), of first order in
its first step, and in its last, where it ends at no noise. Spacings and settings are those of diffusers' schedulers.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from modiff_trt.core.config import DiffusionConfig
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.kinds import FinalAlpha, Prediction, SolverKind, Spacing
from modiff_trt.core.schedule import Array, alphas_cumprod

log = logging.getLogger(__name__)

LARGEST_CLIP, LARGEST_OFFSET = 1e6, 1000


@dataclass(frozen=True, eq=False)
class Updates:
    """The numbers of every step, float64 [steps] each (see above), and the limit of x0; None does not clip."""

    p: Array
    r: Array
    x: Array
    y: Array
    b0: Array
    b1: Array
    n: Array
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def draws_noise(self) -> bool:
        return bool((self.n != 0).any())

    @property
    def looks_back(self) -> bool:
        """Whether a step needs the x0 of the one before it."""
        return bool((self.b1 != 0).any())

    @property
    def sensitivity(self) -> Array:
        """What the final image changes by for each unit that the network's answer of a step is off, float64 [steps]; as if x0
        were not clipped."""
        found = np.zeros(len(self))
        of_x, of_x0 = 1.0, 0.0  # of the image after the step, and of the x0 that the next step looks back to
        for i in reversed(range(len(self))):
            found[i] = of_x * self.y[i] + of_x0 * self.r[i]
            of_x, of_x0 = of_x * self.x[i] + of_x0 * self.p[i], of_x * self.b1[i]
        return found

    def equals(self, other: Updates) -> bool:
        names = ("p", "r", "x", "y", "b0", "b1", "n")
        return self.clip == other.clip and all(np.array_equal(getattr(self, k), getattr(other, k)) for k in names)


@dataclass(frozen=True)
class Solver:
    """What decides the timesteps and the update of a trajectory, as options and files name it.

    `clip_sample` is the limit of |x0|. `steps_offset` is added to every timestep of the spacing `leading`. `final_alpha` says
    where DDIM's last step arrives: at no noise, or at the first timestep's. `order` is DPM-Solver++'s.
    """

    kind: SolverKind = SolverKind.DDIM
    spacing: Spacing = Spacing.QUAD
    prediction: Prediction = Prediction.EPSILON
    clip_sample: float | None = None
    steps_offset: int = 0
    final_alpha: FinalAlpha = FinalAlpha.ONE
    order: int = 2

    def __post_init__(self) -> None:
        if self.clip_sample is not None and not 0 < self.clip_sample <= LARGEST_CLIP:
            raise InputError(f"--clip-sample must be positive, found {self.clip_sample}")
        if not 0 <= self.steps_offset <= LARGEST_OFFSET:
            raise InputError(f"--steps-offset must lie between 0 and {LARGEST_OFFSET}, found {self.steps_offset}")
        if self.steps_offset and self.spacing != Spacing.LEADING:
            raise InputError(f"--steps-offset is for --spacing leading; leave it out with {self.spacing}")
        if self.kind != SolverKind.DDIM and self.final_alpha != FinalAlpha.ONE:
            raise InputError(f"--final-alpha is for --solver ddim: {self.kind} ends at no noise")
        if self.order not in (1, 2):
            raise InputError(f"the order of {self.kind} must be 1 or 2, found {self.order}")

    def timesteps(self, config: DiffusionConfig, steps: int) -> tuple[int, ...]:
        """The timesteps visited, noisiest first. There may be more or fewer than `steps`: see `spaced`. Raises InputError for a
        sequence that this solver cannot take."""
        found = self.spaced(config, steps)
        if found[0] >= config.num_diffusion_timesteps:
            raise InputError(
                f"{steps} steps with --steps-offset {self.steps_offset} begin at timestep {found[0]}, and the last of this "
                f"schedule is {config.num_diffusion_timesteps - 1}; use fewer steps, or a smaller offset"
            )
        if found[-1] < 0:
            raise InputError(
                f"{steps} steps with --spacing {self.spacing} end at timestep {found[-1]}: diffusers' rule makes one too many "
                "of this number; use another"
            )
        repeated = [a for a, b in pairwise(found) if a == b]
        if repeated and self.kind != SolverKind.DDIM:
            raise InputError(
                f"{steps} steps with --spacing {self.spacing} visit timestep {repeated[0]} twice, and {self.kind} divides by "
                "their distance; use fewer steps, or --spacing logsnr"
            )
        return found

    def requested(self, config: DiffusionConfig, steps: int) -> tuple[int, ...]:
        """`timesteps`. Where the spacing turns `steps` into another number, the log says so."""
        found = self.timesteps(config, steps)
        if len(found) != steps:
            log.info("%d steps with --spacing %s become %d%s", steps, self.spacing, len(found), self._why(config, steps))
        return found

    def _why(self, config: DiffusionConfig, steps: int) -> str:
        if self.spacing != Spacing.UNIFORM:
            return ": of equal timesteps one is kept" if self.spacing == Spacing.LOGSNR else ""
        every = config.num_diffusion_timesteps // steps
        nth = "one" if every == 1 else f"{every}th"
        return f": every {nth} of {config.num_diffusion_timesteps} timesteps, as in DDIM's code"

    def spaced(self, config: DiffusionConfig, steps: int) -> tuple[int, ...]:
        """The timesteps of a spacing, noisiest first.

        `quad` and `uniform` are exactly DDIM's code: `quad` repeats the smallest timesteps where there are many, `uniform`
        takes every so manyth one, which may make more. `leading`, `trailing` and `linspace` are those of diffusers' scheduler
        for this solver. `logsnr` takes the timesteps nearest to equal steps of log(alpha / sigma); of equal ones it keeps one.
        """
        total = config.num_diffusion_timesteps
        if not 1 <= steps <= total:
            raise InputError(f"--timesteps must lie between 1 and {total}, found {shown(steps)}")
        # DPM-Solver's schedulers space one step more, and leave the last out.
        one = int(self.kind != SolverKind.DDIM)
        ascending: np.ndarray[Any, Any]
        if self.spacing == Spacing.UNIFORM:
            ascending = np.arange(0, total, total // steps)
        elif self.spacing == Spacing.QUAD:
            ascending = np.linspace(0, np.sqrt(total * 0.8), steps) ** 2
        elif self.spacing == Spacing.LEADING:
            ascending = np.arange(one, steps + one) * (total // (steps + one)) + self.steps_offset
        elif self.spacing == Spacing.LINSPACE:
            ascending = np.linspace(0, total - 1, steps + one).round()[one:]
        elif self.spacing == Spacing.TRAILING:
            return tuple(int(t) for t in np.arange(total, 0, -total / steps).round() - 1)
        else:
            alpha_bar = alphas_cumprod(config)
            snr = _log_snr(alpha_bar[alpha_bar > 0])
            targets = np.linspace(snr[-1], snr[0], steps)
            ascending = np.unique(np.abs(snr[None] - targets[:, None]).argmin(1))
        return tuple(int(t) for t in ascending[::-1])

    def updates(self, config: DiffusionConfig, timesteps: tuple[int, ...], eta: float = 0.0) -> Updates:
        """The numbers of every step of a sequence that this solver made. Raises InputError for an eta that it cannot take."""
        if not 0.0 <= eta <= 1.0:
            raise InputError(f"--eta must lie between 0 and 1, found {eta}")
        if eta > 0 and self.kind != SolverKind.DDIM:
            raise InputError(f"--eta is for --solver ddim; {self.kind} draws no noise")
        alpha_bar = alphas_cumprod(config)
        now = alpha_bar[list(timesteps)]
        if (now == 0).any() and (self.prediction == Prediction.EPSILON or self.kind != SolverKind.DDIM):
            t = timesteps[int((now == 0).argmax())]
            raise InputError(
                f"timestep {t} is pure noise in this beta_schedule, and the solver divides by its signal; use fewer"
            )
        if self.kind == SolverKind.DDIM:
            return self._ddim(alpha_bar, timesteps, eta)
        return self._multistep(now)

    def to_dict(self) -> dict[str, Any]:
        """As files carry it."""
        return asdict(self)

    def describe(self, count: int) -> str:
        """In the words of the options, for a line to the user."""
        parts = [f"--solver {self.kind}", f"--timesteps {count}", f"--spacing {self.spacing}"]
        if self.prediction != Prediction.EPSILON:
            parts.append(f"--prediction {self.prediction}")
        if self.clip_sample is not None:
            parts.append(f"--clip-sample {self.clip_sample:g}")
        if self.steps_offset:
            parts.append(f"--steps-offset {self.steps_offset}")
        if self.final_alpha != FinalAlpha.ONE:
            parts.append(f"--final-alpha {self.final_alpha}")
        return " ".join(parts)

    def _x0(self, now: Array) -> tuple[Array, Array]:
        """(p, r) of x0 = p x + r y."""
        if self.prediction == Prediction.EPSILON:
            return 1 / np.sqrt(now), -np.sqrt((1 - now) / now)
        if self.prediction == Prediction.V:
            return np.sqrt(now), -np.sqrt(1 - now)
        return np.zeros_like(now), np.ones_like(now)

    def _ddim(self, alpha_bar: Array, timesteps: tuple[int, ...], eta: float) -> Updates:
        final = 1.0 if self.final_alpha == FinalAlpha.ONE else alpha_bar[0]
        if self.spacing in (Spacing.LEADING, Spacing.TRAILING, Spacing.LINSPACE):
            # Where diffusers' DDIM arrives does not follow from the next timestep but from the number of steps.
            reached = [t - len(alpha_bar) // len(timesteps) for t in timesteps]
        else:
            reached = [*timesteps[1:], -1]
        now = alpha_bar[list(timesteps)]
        after = np.asarray([alpha_bar[t] if t >= 0 else final for t in reached])
        # Where the sequence stands still or turns back there is nothing to draw.
        sigma = eta * np.sqrt(np.maximum((1 - now / after) * (1 - after) / (1 - now), 0))
        toward = np.sqrt(np.maximum(1 - after - sigma**2, 0))  # what epsilon is multiplied by
        p, r = self._x0(now)
        if self.prediction == Prediction.EPSILON:
            x, y = np.sqrt(after / now), toward - np.sqrt((1 - now) * after / now)
        elif self.prediction == Prediction.V:
            x, y = np.sqrt(after * now) + toward * np.sqrt(1 - now), toward * np.sqrt(now) - np.sqrt(after * (1 - now))
        else:
            x, y = toward / np.sqrt(1 - now), np.sqrt(after) - toward * np.sqrt(now / (1 - now))
        return Updates(p, r, x, y=y, b0=np.sqrt(after), b1=np.zeros_like(x), n=sigma, clip=self.clip_sample)

    def _multistep(self, now: Array) -> Updates:
        alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
        after_alpha, after_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
        snr = _log_snr(now)
        h = np.append(np.diff(snr), np.inf)
        decay = -np.expm1(-h)  # 1 - exp(-h); the last step ends at no noise
        b0 = after_alpha * decay
        b1 = np.zeros_like(b0)
        if self.order == 2 and len(now) > 2:
            inner = slice(1, len(now) - 1)
            share = 0.5 * h[inner] / h[: len(now) - 2]  # 1 / (2 r), r being the step before over this one
            b0[inner], b1[inner] = after_alpha[inner] * decay[inner] * (1 + share), -after_alpha[inner] * decay[inner] * share
        p, r = self._x0(now)
        kept = after_sigma / sigma
        return Updates(p, r, kept + b0 * p, y=b0 * r, b0=b0, b1=b1, n=np.zeros_like(b0), clip=self.clip_sample)


def _log_snr(alpha_bar: Array) -> Array:
    """log(alpha / sigma)."""
    return np.asarray(0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar)))


def solver_from_dict(found: Any, source: str) -> Solver:
    """A solver as files carry it. Raises InputError if it is damaged."""
    try:
        clip, offset, order = found["clip_sample"], found["steps_offset"], found["order"]
        if not (clip is None or type(clip) in (float, int)) or type(offset) is not int or type(order) is not int:
            raise TypeError("type")
        return Solver(
            SolverKind(found["kind"]),
            Spacing(found["spacing"]),
            Prediction(found["prediction"]),
            clip_sample=clip,
            steps_offset=offset,
            final_alpha=FinalAlpha(found["final_alpha"]),
            order=order,
        )
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{source} names a solver that this program does not have: {shown(found)}") from None
