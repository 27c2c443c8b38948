"""Calibration by trial: runs whole quantized trajectories and keeps what is best for the final image.

Two searches live here. `search_scales` decides which share of the residuals a static grid holds. `search_rows` gives every
row its own grid, with a margin chosen by what the quantized trajectory does, not the float one. Which layers can do without
MoDiff state is searched in `modes`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import arrays_digest
from modiff_trt.core.grid import grid_max
from modiff_trt.core.rows import RowTable
from modiff_trt.core.scales import Scales, scales_digest
from modiff_trt.core.solvers import Solver
from modiff_trt.core.state_grid import with_whole_steps
from modiff_trt.export.calibration.kept_trials import KeptTrials
from modiff_trt.export.calibration.residuals import refit
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.modulated import LayerState, QuantizedLayer
from modiff_trt.networks.operations import Network
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory

Report = Callable[[str], None]
Array = np.ndarray[Any, Any]

MARGINS = (1.0, 0.7, 0.5, 0.35)
# Shares of the residuals that a searched static grid holds.
PERCENTILES = (0.99999, 0.9999, 0.9997, 0.999, 0.997, 0.99)
# The PSNR in dB that a finer grid may lose to the best before the still finer ones are left.
TOO_FAR = 3.0
# Trial trajectories of both searches, at most, of shares and then of rows.
SEARCH_TRIALS = len(PERCENTILES) + 2 + 1 + 2 * len(MARGINS)
# Images that are equal to FP32's, or not finite, get this in place of an infinity.
MOST_DECIBELS = 999.0
# A residual's row may need a coarser grid than the static one where quantization itself has made it larger.
WIDEST = 4.0
FINEST = 1 / 16


class Trials:
    """Runs scales from fixed calibration noise, image i conditioned on line i of a context, and scores them by PSNR to FP32."""

    def __init__(
        self,
        network: Network,
        checkpoint: Checkpoint,
        timesteps: tuple[int, ...],
        solver: Solver,
        *,
        images: int,
        seed: int,
        device: str,
        context: Context = NO_CONTEXT,
        kept: Path | None = None,
    ) -> None:
        """`kept` is a file where what trials gave stands until the caller removes it: none is run twice."""
        self.network, self.checkpoint, self._device = network, checkpoint, device
        self._updates = solver.updates(network.config.diffusion, timesteps)
        self._noise = ImageNoise(seed, range(images), network.config.input_shape).draw()
        self._context = context
        settings = {
            "checkpoint_sha256": checkpoint.sha256,
            "timesteps": timesteps,
            "solver": solver.to_dict(),
            "images": images,
            "seed": seed,
            "device": device,
            "context": arrays_digest({"guidance": context.guidance}, context.of(range(images))),
        }
        self._kept = None if kept is None else KeptTrials(kept, settings)
        self._reference = self.sample(trained.unquantized(network, checkpoint.params, timesteps, device=device))

    def _once(self, what: str, scales: Scales, run: Callable[[], Array]) -> Array:
        return run() if self._kept is None else self._kept.of(f"{what} {scales_digest(scales)}", run)

    def decibels(self, scales: Scales) -> float:
        """`score` of the simulation of these scales."""
        return self.timed(scales)[0]

    def mean_decibels(self, scales: Scales) -> float:
        """The mean over the images of each one's PSNR to FP32 in dB, within MOST_DECIBELS.

        `decibels` is of all images together, and where one is far worse than the others it is of that one alone. Modes that
        were chosen by it lost 0.2 dB on 16 images, and 3 dB on others (docs/lab/modes.md).
        """

        def run() -> Array:
            try:
                images = self.images_of(scales)
            except InputError:
                return np.asarray([-MOST_DECIBELS])
            each = [psnr(image[None], exact[None]) for image, exact in zip(images, self._reference, strict=True)]
            return np.asarray([np.clip(each, -MOST_DECIBELS, MOST_DECIBELS).mean()])

        return float(self._once("each image", scales, run)[0])

    def timed(self, scales: Scales) -> tuple[float, float]:
        """`decibels`, and the seconds that the trial took when it was run."""

        def run() -> Array:
            begin = time.perf_counter()
            score = self.score(trained.simulated(self.network, self.checkpoint.params, scales, device=self._device))
            return np.asarray([score, time.perf_counter() - begin])

        score, seconds = self._once("whole", scales, run)
        return float(score), float(seconds)

    def difference(self, scales: Scales, layer: str, exact: Array) -> float:
        """Mean squared difference to `exact` of the final images, of which only this layer rounds its activation: `scales`
        have no state. Infinite where they are not finite."""

        def run() -> Array:
            try:
                return np.asarray([np.square(self.images_of(scales, act_quant=(layer,)).astype(np.float64) - exact).mean()])
            except InputError:
                return np.asarray([float("inf")])

        return float(self._once(f"{layer} alone, to {arrays_digest({}, {'images': exact})}", scales, run)[0])

    def images_of(self, scales: Scales, act_quant: bool | Collection[str] = True) -> Array:
        """The final images of the simulation of these scales; `act_quant` is `SimDenoiser`'s. Raises InputError where they are
        not finite."""
        simulated = partial(trained.simulated, self.network, self.checkpoint.params, scales, device=self._device)
        return self.sample(simulated(act_quant=act_quant))

    def weights_alone(self, scales: Scales) -> float:
        """`decibels` with exact activations."""
        simulated = partial(trained.simulated, self.network, self.checkpoint.params, scales, device=self._device)
        return float(self._once("weights", scales, lambda: np.asarray([self.score(simulated(act_quant=False))]))[0])

    def residuals(self, scales: Scales) -> tuple[float, Array]:
        """PSNR, and the largest |x - a_hat| [rows, modulated layers] that each pass had to round."""
        found = self._once("residuals", scales, lambda: self._watch_residuals(scales))
        return float(found[0]), found[1:].reshape(len(scales.rows), -1).astype(np.float32)

    def _watch_residuals(self, scales: Scales) -> Array:
        """float64 [1 + rows * layers]: the PSNR, and the largest residuals."""
        passes: list[dict[str, float]] = []
        first = scales.modulated[0]

        def watch(layer: QuantizedLayer, x: Tensor, state: LayerState) -> None:
            if layer.spec.name == first:
                passes.append({})
            passes[-1][layer.spec.name] = float((x - state.a_hat).abs().max())

        watched = trained.simulated(self.network, self.checkpoint.params, scales, device=self._device, on_layer=watch)
        score = self.score(watched)
        return np.asarray([score, *(found[name] for found in passes for name in scales.modulated)])

    def score(self, denoiser: Denoiser) -> float:
        """PSNR in dB of one whole trajectory; minus infinity where it is not finite: the method has failed there."""
        try:
            return self.against(self.sample(denoiser))
        except InputError:
            return float("-inf")

    def sample(self, denoiser: Denoiser) -> Array:
        """The final images, float32 [N, C, H, W]. Raises InputError where they are not finite."""
        lines = self._context.of(range(len(self._noise)))
        return sample_trajectory(guided(denoiser, self._context), self._updates, self._noise, context=lines)

    def against(self, samples: Array) -> float:
        """PSNR in dB of final images to FP32's."""
        return psnr(samples, self._reference)


@dataclass(frozen=True)
class Verdict:
    """PSNR to FP32 in dB of the whole method, of the rounded weights alone, and of the same layers without state (None where
    there is none), and the seconds that one trial took."""

    decibels: float
    weights_alone: float
    seconds: float
    stateless: float | None = None

    @property
    def weights_limit(self) -> bool:
        """Whether at least half of the squared error is there with exact activations too."""
        return self.weights_alone <= self.decibels + 10 * log10(2)


def judge(trials: Trials, scales: Scales) -> Verdict:
    """What scales are worth on the trial images, and how much of the error is the weights'."""
    whole, seconds = trials.timed(scales)
    stateless = trials.decibels(scales.without_modulation()) if scales.modulated else None
    return Verdict(whole, trials.weights_alone(scales), seconds, stateless)


def search_scales(trials: Trials, scales: Scales, candidates: Mapping[float, Mapping[str, float]], report: Report) -> Scales:
    """The scales with the best residual scales found among those given and `candidates` (by percentile), and with or
    without dither.

    A residual beyond its grid is not lost: a_hat follows it at the next passes. So at few bits a grid that clips the rare
    large residuals is better than one that holds them all; which share to clip is measured here on whole trajectories.
    """
    best, top_score, kept = scales, trials.decibels(scales), "as calibrated"
    report(f"scales: as calibrated: {top_score:.2f} dB")
    for percentile, steps in candidates.items():
        candidate = refit(scales, steps)
        score = trials.decibels(candidate)
        report(f"scales: percentile {percentile}: {score:.2f} dB")
        if score > top_score:
            best, top_score, kept = candidate, score, f"percentile {percentile}"
        if score < top_score - TOO_FAR:
            break  # the others clip more
    if best.dither:
        plain = replace(best, dither=False)
        score = trials.decibels(plain)
        report(f"scales: the best without dither: {score:.2f} dB")
        if score > top_score:
            best, top_score, kept = plain, score, f"{kept}, without dither"
    report(f"scales: kept {kept}: {top_score:.2f} dB")
    return best


def search_rows(trials: Trials, scales: Scales, report: Report) -> Scales:
    """The scales with the best row table found: static, or one multiplier per row and layer.

    A candidate covers the largest residual of each row times a margin, warm-up rows included, of which none is finer than
    the first running row. It is measured with the quantized network in the loop, once more after its own first run,
    because a finer row changes the residuals of the rows after it.
    """
    if not scales.modulated:
        return scales
    best, kept, (top_score, seen) = scales, "static", trials.residuals(scales)
    report(f"rows: static: {top_score:.2f} dB")
    finest = float("-inf")
    for margin in MARGINS:
        residuals, of_margin = seen, float("-inf")
        for attempt in (1, 2):
            candidate = with_whole_steps(replace(scales, rows=_covering(scales, residuals, margin)))
            score, found = trials.residuals(candidate)
            report(f"rows: margin {margin}, attempt {attempt}: {score:.2f} dB")
            if score > top_score:
                best, top_score, kept = candidate, score, f"margin {margin}, attempt {attempt}"
            residuals, of_margin = np.maximum(residuals, found), max(of_margin, score)
        if of_margin < finest - TOO_FAR:
            break
        finest = max(finest, of_margin)
    report(f"rows: kept {kept}: {top_score:.2f} dB")
    return best


def _covering(scales: Scales, residuals: Array, margin: float) -> RowTable:
    """A row table whose grids reach `margin` times these largest magnitudes [rows, modulated layers]; warm-up rows reach
    all of them."""
    reach = np.asarray([grid_max(scales.layers[n].act_bits) * scales.layers[n].scale for n in scales.modulated], np.float32)
    warmup = scales.rows.warmup
    multipliers = residuals / reach
    multipliers[warmup:] = np.clip(margin * multipliers[warmup:], FINEST, WIDEST)
    multipliers[:warmup] = np.maximum(multipliers[:warmup], multipliers[warmup])
    return replace(scales.rows, multipliers=multipliers.astype(np.float32))
