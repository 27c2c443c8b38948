"""How many passes an image needs, by solver and spacing, and what quantization leaves of it.

    python -m modiff_trt.tools.research.solver_study --config configs/cifar10.yml --ckpt FILE --reference IMAGES \\
        --device cuda --out results/solver_study.json

Parts: `nearness` (PSNR to 1000 DDIM steps of the same noise, in FP32), `quality` (FD-CIFAR to the reference, and the time of an
image: DDIM and the best solver in floating point, then MoDiff and Q-Diff in true INT8), `bits` (simulated MoDiff and Q-Diff by
activation bits and kind of grid, PSNR to the same solver in FP32), `native` (true INT8 against the simulation, and batch sizes
against each other) and `whole` (one long run of DDIM and one of the best solver in INT8). The file is written after every
figure; the same command goes on from there. `solver_figure` draws the part `quality`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import SolverKind, Spacing
from modiff_trt.core.scales import Scales
from modiff_trt.core.solvers import Solver
from modiff_trt.export.calibration.collecting import collect
from modiff_trt.export.calibration.pipeline import TRIAL_SEED, measure
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.calibration.trials import Trials, search_rows
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.options import check_device, load_model
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.folders import rounded_psnr, to_uint8
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.images.sets import open_images
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.tools.assets import classifier_path
from modiff_trt.tools.cli.calibrate import INTENSITY
from modiff_trt.tools.evaluation.cifar_features import SHIPPED_SHA256, CifarFeatures
from modiff_trt.tools.evaluation.frechet import Moments, frechet_distance
from modiff_trt.tools.evaluation.measures import Statistics, load_statistics, reference_statistics
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.research.figures import Figures
from modiff_trt.tools.research.refusals import refuses_bad_input

# Images by which grids for every row are found.
ROW_TRIALS = 16
PARTS = "nearness,bits,native,quality,whole"
PASSES = "10,12,15,20,25,33,50,100"
TRUTH = Solver(spacing=Spacing.UNIFORM)
BASELINE = Solver()
BEST = Solver(SolverKind.DPMPP_2M, Spacing.LOGSNR)
FLOAT = "floating point"

Array = np.ndarray[Any, Any]


def name_of(solver: Solver) -> str:
    return f"{solver.kind} {solver.spacing}"


def _rounded(score: Callable[[], float]) -> float:
    return round(score(), 2)


@dataclass(frozen=True)
class Judge:
    """The features of FD-CIFAR, and the statistics of the reference."""

    features: CifarFeatures
    statistics: Statistics


class SolverStudy:
    """One network, and everything measured of it."""

    def __init__(
        self,
        config: Path,
        ckpt: Path,
        *,
        images: int,
        fd_images: int,
        whole_images: int,
        truth_steps: int,
        batch_size: int,
        device: str,
        out: Path,
        deadline: float,
    ) -> None:
        self.network, self.checkpoint = load_model(config, ckpt)
        self.device, self._batch, self._out = check_device(device), batch_size, out
        params = {key: value.to(device) for key, value in self.checkpoint.params.items()}
        self._on_device = replace(self.checkpoint, params=params)
        settings = {
            "checkpoint_sha256": self.checkpoint.sha256,
            "images": images,
            "fd_images": fd_images,
            "whole_images": whole_images,
            "truth_steps": truth_steps,
        }
        self._kept = Figures(out, settings, provenance(device), deadline=deadline)
        self.figures, self.record = self._kept.data, self._kept.record
        self._images, self._fd_images, self._whole_images, self._truth_steps = images, fd_images, whole_images, truth_steps
        self._calibrated: dict[tuple[Solver, int], Any] = {}
        self._compiled: Any = None

    @property
    def time_is_up(self) -> bool:
        """Whether no figure may begin any more."""
        return self._kept.time_is_up

    def steps(self, solver: Solver, passes: int) -> tuple[int, ...]:
        return solver.timesteps(self.network.config.diffusion, passes)

    def floating(self, solver: Solver, passes: int) -> Denoiser:
        """The fastest floating-point network of the device: FP16 compiled on a GPU, FP32 on a CPU."""
        steps, params = self.steps(solver, passes), self.checkpoint.params
        if self.device == "cpu":
            return trained.unquantized(self.network, params, steps)
        if self._compiled is None:
            self._compiled = trained.compiled_fp16(self.network, params, steps, solver)
        return self._compiled.along(steps, solver)  # type: ignore[no-any-return]

    def exact(self, solver: Solver, passes: int, indices: range) -> Array:
        """Final images of FP32."""
        steps = self.steps(solver, passes)
        denoiser = trained.unquantized(self.network, self._on_device.params, steps, device=self.device)
        return self.images(denoiser, solver, indices)[0]

    def images(self, denoiser: Denoiser, solver: Solver, indices: range, size: int | None = None) -> tuple[Array, float]:
        """Final images, float32, of seed 0, and the seconds that they took without what happens once."""
        updates = solver.updates(self.network.config.diffusion, denoiser.rows.timesteps)
        size, found, seconds = min(size or self._batch, len(indices)), [], 0.0
        for first in {size, len(indices) % size} - {0}:
            denoiser.reset(first)  # compiles, tunes and captures
        for begin in range(0, len(indices), size):
            noise = ImageNoise(0, indices[begin : begin + size], self.network.config.input_shape).draw()
            before = time.perf_counter()
            found.append(sample_trajectory(denoiser, updates, noise))
            seconds += time.perf_counter() - before
        return np.concatenate(found), seconds

    def calibrated(self, solver: Solver, passes: int) -> Any:
        """(trajectories, ranges), by collecting as many images as are compared."""
        if (solver, passes) not in self._calibrated:
            stored = collect(
                self.network,
                self.checkpoint,
                timesteps=passes,
                solver=solver,
                num_samples=self._images,
                calib_steps=20,
                seed=1,
                batch_size=64,
                device=self.device,
                out=self._out.with_suffix(f".{solver.kind}-{passes}.trajectories.safetensors"),
            )
            part = self._out.with_suffix(f".{solver.kind}-{passes}.ranges.part")
            found = measure(self.network, self.checkpoint, stored, batch_size=64, device=self.device, part=part)
            part.unlink(missing_ok=True)
            self._calibrated[solver, passes] = stored, found
        return self._calibrated[solver, passes]

    def scales(self, solver: Solver, passes: int, **recipe: Any) -> Scales:
        stored, ranges = self.calibrated(solver, passes)
        recipe = {"min_intensity": INTENSITY} | recipe
        return make_scales(self.network, self._on_device, stored, ranges=ranges, recipe=Recipe(**recipe))

    @cached_property
    def _truth(self) -> Array:
        return self.exact(TRUTH, self._truth_steps, range(self._images))

    def nearness(self, passes: list[int]) -> None:
        """PSNR to the truth, every solver and spacing. What cannot be is recorded as the reason."""
        for kind in SolverKind:
            for spacing in Spacing:
                solver = Solver(kind, spacing)
                for count in passes:

                    def figures(solver: Solver = solver, count: int = count) -> dict[str, Any]:
                        try:
                            steps = self.steps(solver, count)
                        except InputError as error:
                            return {"refused": str(error)}
                        found = self.exact(solver, count, range(self._images))
                        return {"passes": len(steps), "psnr_db": rounded_psnr(found, self._truth, 3)}

                    self.record("nearness", f"{name_of(solver)} {count}", figures)

    def bits(self, passes: list[int], widths: list[int]) -> None:
        """MoDiff by kind of grid, and Q-Diff, in simulation."""
        for count in passes:
            trials = self._trials(count, self._images, seed=0)
            alone = partial(trials.weights_alone, self.scales(BEST, count))
            self.record("bits", f"{count} passes, weights alone", partial(_rounded, alone))
            for width in widths:
                scales = self.scales(BEST, count, act_bits=width)
                sampled = self.scales(BEST, count, act_bits=width, granularity="tensor")
                plain = self.scales(BEST, count, act_bits=width, method="qdiff")
                candidates = {
                    "MoDiff, a grid a layer": partial(trials.decibels, scales),
                    "MoDiff, a grid a row": partial(self._by_rows, count, scales, trials),
                    "MoDiff, a grid a sample": partial(trials.decibels, sampled),
                    "Q-Diff": partial(trials.decibels, plain),
                }
                for label, score in candidates.items():
                    self.record("bits", f"{count} passes, {label} A{width}", partial(_rounded, score))

    def _by_rows(self, passes: int, scales: Scales, trials: Trials) -> float:
        """PSNR with a grid for every row."""
        return trials.decibels(self._rows(passes, scales))

    def _rows(self, passes: int, scales: Scales) -> Scales:
        """A grid for every row, found by trial on other noise."""
        return search_rows(self._trials(passes, ROW_TRIALS, seed=TRIAL_SEED), scales, typer.echo)

    def _trials(self, passes: int, images: int, seed: int) -> Trials:
        steps = self.steps(BEST, passes)
        return Trials(self.network, self.checkpoint, steps, solver=BEST, images=images, seed=seed, device=self.device)

    def native(self, passes: int, sizes: list[int]) -> None:
        """True INT8 against the simulation, both to FP32, and against itself in other batches; FP16 beside it."""

        def figures() -> dict[str, Any]:
            scales, indices = self._rows(passes, self.scales(BEST, passes)), range(self._images)
            exact = self.exact(BEST, passes, indices)
            denoiser = self.native_denoiser(scales)
            found = {size: self.images(denoiser, BEST, indices, size)[0] for size in sizes}
            simulation = trained.simulated(self.network, self.checkpoint.params, scales, device=self.device)
            simulated = self.images(simulation, BEST, indices)[0]
            floating = self.images(self.floating(BEST, passes), BEST, indices)[0]
            first = found[sizes[0]]
            return {
                "simulation_db": rounded_psnr(simulated, exact, 3),
                "native_db": rounded_psnr(first, exact, 3),
                "native_to_simulation_db": rounded_psnr(first, simulated, 3),
                f"{FLOAT}_db": rounded_psnr(floating, exact, 3),
                "same_bits": {str(size): bool((images == first).all()) for size, images in found.items()},
            }

        self.record("native", f"{passes} passes", figures)

    def native_denoiser(self, scales: Scales) -> Denoiser:
        return trained.native(self.network, self.checkpoint.params, scales, self.device)

    def quality(self, passes: list[int], reference: Path) -> None:
        """FD-CIFAR and microseconds an image of four lines."""
        judge = self.judge(reference)
        for count in passes:
            for solver in (BASELINE, BEST):
                try:
                    self.steps(solver, count)
                except InputError:
                    continue
                line = partial(self.measured, partial(self.floating, solver, count), solver, judge, count=self._fd_images)
                self.record("quality", f"{FLOAT}, {name_of(solver)} {count}", line)
            for label, modulate in (("MoDiff", True), ("Q-Diff", False)):
                line = partial(
                    self.measured, partial(self._quantized, BEST, count, modulate), BEST, judge, count=self._fd_images
                )
                self.record("quality", f"native {label} W8A8, {name_of(BEST)} {count}", line)

    def whole(self, passes: int, reference: Path) -> None:
        """One long run of DDIM with 100 passes and one of the best solver, both in INT8 with MoDiff."""
        judge = self.judge(reference)
        for solver, count in ((BEST, passes), (BASELINE, 100)):
            line = partial(
                self.measured, partial(self._quantized, solver, count, True), solver, judge, count=self._whole_images
            )
            self.record("whole", f"native MoDiff W8A8, {name_of(solver)} {count}", line)

    def _quantized(self, solver: Solver, passes: int, modulate: bool) -> Denoiser:
        scales = self.scales(solver, passes)
        return self.native_denoiser(scales if modulate else scales.without_modulation())

    def judge(self, reference: Path) -> Judge:
        features = CifarFeatures(classifier_path(), self.device, SHIPPED_SHA256)
        if reference.suffix == ".safetensors":
            return Judge(features, load_statistics(reference, features))
        return Judge(features, reference_statistics(open_images(reference), features, 512))

    def measured(self, make: Callable[[], Denoiser], solver: Solver, judge: Judge, count: int) -> dict[str, Any]:
        """FD-CIFAR of so many images, and the time that they took."""
        denoiser = make()
        moments, seconds, part = Moments(), 0.0, 40 * self._batch
        for begin in range(0, count, part):
            images, spent = self.images(denoiser, solver, range(begin, min(begin + part, count)))
            seconds += spent
            pictures = to_uint8(images)
            for at in range(0, len(pictures), 512):
                moments.add(judge.features(pictures[at : at + 512])["features"])
        return {
            "passes": len(denoiser.rows),
            "images": count,
            "seconds": round(seconds, 3),
            "microseconds_an_image": round(seconds * 1e6 / count, 1),
            "fd_cifar": round(frechet_distance(moments.gaussian(), judge.statistics.gaussians["features"]), 4),
        }


@refuses_bad_input
def main(
    config: Annotated[Path, typer.Option(help="DDIM configuration (.yml)")],
    ckpt: Annotated[Path, typer.Option(help="trained weights")],
    reference: Annotated[Path, typer.Option(help="images, or statistics that `evaluate` left in its cache (.safetensors)")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    passes: Annotated[str, typer.Option(help="numbers of passes, comma-separated")] = PASSES,
    few: Annotated[str, typer.Option(help="bits, native, whole: numbers of passes; native and whole take the last")] = "20,33",
    bits: Annotated[str, typer.Option(help="bits: of the activations, comma-separated, most first")] = "8,6,4",
    images: Annotated[int, typer.Option(help="images of nearness, bits and native, and of calibration")] = 64,
    fd_images: Annotated[int, typer.Option(help="images of quality")] = 10240,
    whole_images: Annotated[int, typer.Option(help="images of whole")] = 50000,
    truth_steps: Annotated[int, typer.Option(help="DDIM steps of the truth")] = 1000,
    batch_size: Annotated[int, typer.Option(help="images in one pass")] = 256,
    parts: Annotated[str, typer.Option(help=f"comma-separated, of {PARTS}")] = PARTS,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seconds: Annotated[float, typer.Option(help="begin no new figure after this long")] = 1e9,
) -> None:
    """Measures how many passes an image needs."""
    wanted = parts.split(",")
    unknown = [part for part in wanted if part not in PARTS.split(",")]
    if unknown:
        raise InputError(f"--parts: unknown part '{unknown[0]}'; known: {PARTS}")
    study = SolverStudy(
        config,
        ckpt,
        images=images,
        fd_images=fd_images,
        whole_images=whole_images,
        truth_steps=truth_steps,
        batch_size=batch_size,
        device=device,
        out=out,
        deadline=seconds,
    )
    counts, fewer = ([int(n) for n in text.split(",")] for text in (passes, few))
    for part in wanted:
        if part == "nearness":
            study.nearness(counts)
        elif part == "bits":
            study.bits(fewer, [int(n) for n in bits.split(",")])
        elif part == "native":
            study.native(fewer[-1], sorted({images, max(images // 4, 1), 1}, reverse=True))
        elif part == "quality":
            study.quality(counts, reference)
        else:
            study.whole(fewer[-1], reference)


if __name__ == "__main__":
    typer.run(main)
