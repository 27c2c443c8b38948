"""Measures methods against each other in simulation, in one run, from the same noise: PSNR of final images to FP32.

    python -m modiff_trt.tools.research.study --config configs/cifar10.yml --ckpt FILE --images 16 --out results/study.json

Parts: `weights` (nearest rounding and AdaRound, W8 and W4), `methods` (the six rows of the paper's table by bits), `scales`
(how the static residual scale is found), `rows` (static grids against a grid per row, both searched by trial), `starts`
(how a trajectory begins, see `STARTS`; with --percentile on such grids instead of min-max) and `state` (types of a_hat and
o_hat, see `STATES`). The file is written after every figure, so an interrupted run keeps what it found; the same command
goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.grid import grid_max
from modiff_trt.core.kinds import Method, Mode, Spacing
from modiff_trt.core.rows import rows_after
from modiff_trt.core.scales import Scales, load_scales, save_scales
from modiff_trt.core.solvers import Solver
from modiff_trt.export.calibration.adaround import AdaRoundOptions
from modiff_trt.export.calibration.collecting import collect
from modiff_trt.export.calibration.pipeline import TRIAL_SEED, learn_weights, measure, residual_scales
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.calibration.trials import PERCENTILES, Trials, search_rows, search_scales
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.options import check_device, load_model
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.research.figures import Figures
from modiff_trt.tools.research.refusals import refuses_bad_input
from modiff_trt.tools.research.states import offset_between, rounded_between

PARTS = "methods,scales,rows,starts,weights"
METHODS = {
    "Q-Diff": ("qdiff", "static"),
    "Q-Diff + MoDiff": ("modiff", "static"),
    "LCQ": ("qdiff", "channel"),
    "LCQ + MoDiff": ("modiff", "channel"),
    "LTQ": ("qdiff", "tensor"),
    "LTQ + MoDiff": ("modiff", "tensor"),
}


SCALE_RECIPES: dict[str, dict[str, Any]] = {
    "min-max": {},
    "MSE": {"scale_method": "mse", "weight_scale_method": "mse"},
    **{f"percentile {100 * p:g}": {"scale_method": "percentile", "percentile": p} for p in PERCENTILES},
}


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# name -> types of a_hat and o_hat, and passes between refreshes; a_hat in float32 stands for the native backend's exact int16
STATES: dict[str, dict[str, Any]] = {
    "float32, float32": {"a_hat": SINGLE, "o_hat": SINGLE},
    "exact, float16": {"a_hat": SINGLE, "o_hat": HALF},
    "exact, float16, refreshed every 20": {"a_hat": SINGLE, "o_hat": HALF, "refresh": 20},
    "exact, bfloat16": {"a_hat": SINGLE, "o_hat": BRAIN},
    "exact, bfloat16, refreshed every 20": {"a_hat": SINGLE, "o_hat": BRAIN, "refresh": 20},
    "float16, float16": {"a_hat": HALF, "o_hat": HALF},
    "float16, float16, refreshed every 20": {"a_hat": HALF, "o_hat": HALF, "refresh": 20},
    "bfloat16, bfloat16": {"a_hat": BRAIN, "o_hat": BRAIN},
}


def with_rows(scales: Scales, warmup: list[np.ndarray[Any, Any]]) -> Scales:
    """The same scales with these warm-up multipliers [L] each, then ones."""
    return replace(scales, rows=rows_after(warmup, scales.rows.timesteps, len(scales.modulated)))


def full_range(scales: Scales) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(m0 [L], Q [L]) of the warm-up rows of a calibrated file."""
    top = np.asarray([grid_max(scales.layers[name].act_bits) for name in scales.modulated], np.float32)
    return scales.rows.multipliers[0], top


def ladder(scales: Scales, factor: float, floor: float, longest: int = 12) -> Scales:
    """Warm-up rows that shrink the full range by factor/Q each, never below `floor`, until all layers are there."""
    first, top = full_range(scales)
    rows = [first]
    while len(rows) < longest and (rows[-1] > floor).any():
        rows.append(np.where(rows[-1] > floor, np.maximum(rows[-1] * factor / top, floor), rows[-1]))
    return with_rows(scales, rows)


def two_rows(scales: Scales, factor: float) -> Scales:
    first, top = full_range(scales)
    return with_rows(scales, [first, first * factor / top])


StartFn = Callable[[Scales, Scales], tuple[Scales, dict[str, Any]]]

# name -> (scales with the default warm-up, scales with an exact start) -> what to run
STARTS: dict[str, StartFn] = {
    "exact (the paper)": lambda warm, exact: (exact, {}),
    "exact, offset 1/4": lambda warm, exact: (exact, {"width": 0.25}),
    "exact, offset 1/2": lambda warm, exact: (exact, {"width": 0.5}),
    "exact, offset 1": lambda warm, exact: (exact, {"width": 1.0}),
    "exact, noise 1/4 every step": lambda warm, exact: (exact, {"width": 0.25, "every": True}),
    "exact, noise 1/2 every step": lambda warm, exact: (exact, {"width": 0.5, "every": True}),
    "two rows, 1/Q": lambda warm, exact: (two_rows(warm, 1), {}),
    "two rows, 2/Q": lambda warm, exact: (two_rows(warm, 2), {}),
    "two rows, 4/Q": lambda warm, exact: (two_rows(warm, 4), {}),
    "ladder 1/Q to 1": lambda warm, exact: (ladder(warm, 1, 1.0), {}),
    "ladder 2/Q to 1": lambda warm, exact: (ladder(warm, 2, 1.0), {}),
    "ladder 2/Q to 2": lambda warm, exact: (ladder(warm, 2, 2.0), {}),
    "ladder 2/Q to 1/2": lambda warm, exact: (ladder(warm, 2, 0.5), {}),
    "ladder 2/Q to 1/4": lambda warm, exact: (ladder(warm, 2, 0.25), {}),
    "ladder 2/Q to 1/4, noise 1/4": lambda warm, exact: (ladder(warm, 2, 0.25), {"width": 0.25, "every": True}),
    "ladder 2/Q to 1, noise 1/4": lambda warm, exact: (ladder(warm, 2, 1.0), {"width": 0.25, "every": True}),
}


class Study:
    """Everything measured against one reference, and the file that it goes to."""

    def __init__(
        self,
        config: Path,
        ckpt: Path,
        timesteps: int,
        images: int,
        calibration_images: int,
        device: str,
        out: Path,
        deadline: float,
        skip_type: Spacing = Spacing.QUAD,
    ) -> None:
        self.network, self.checkpoint = load_model(config, ckpt)
        self.device, self.out = check_device(device), out
        work = out.with_suffix(".trajectories.safetensors")
        self.trajectories = collect(
            self.network,
            self.checkpoint,
            timesteps=timesteps,
            solver=Solver(spacing=skip_type),
            num_samples=calibration_images,
            calib_steps=20,
            seed=1,
            batch_size=64,
            device=device,
            out=work,
        )
        self._rounding: dict[str, Any] = {}
        params = {key: value.to(device) for key, value in self.checkpoint.params.items()}
        self._on_device = replace(self.checkpoint, params=params)
        part = out.with_suffix(".ranges.part")
        self.ranges = measure(self.network, self.checkpoint, self.trajectories, batch_size=64, device=device, part=part)
        part.unlink(missing_ok=True)
        self._trials = Trials(
            self.network,
            self.checkpoint,
            self.trajectories.timesteps,
            solver=self.trajectories.solver,
            images=images,
            seed=0,
            device=device,
        )
        settings = {
            "checkpoint_sha256": self.checkpoint.sha256,
            "timesteps": timesteps,
            "skip_type": skip_type,
            "images": images,
            "calibration_images": calibration_images,
            "unit": "dB, PSNR of all images together to FP32 from the same noise",
        }
        self._kept = Figures(out, settings, provenance(device), deadline=deadline)
        self.figures, self.record = self._kept.data, self._kept.record

    def scales(self, **recipe: Any) -> Scales:
        scales = make_scales(self.network, self._on_device, self.trajectories, ranges=self.ranges, recipe=Recipe(**recipe))
        layers = {n: replace(layer, **self._rounding.get(n, {})) for n, layer in scales.layers.items()}
        return replace(scales, layers=layers)

    def decibels(self, scales: Scales, act_quant: bool = True, **offset: Any) -> float:
        between = offset_between(**offset) if offset else None
        return round(self._trials.score(self._simulated(scales, act_quant=act_quant, between_passes=between)), 2)

    def _simulated(self, scales: Scales, **options: Any) -> SimDenoiser:
        return trained.simulated(self.network, self.checkpoint.params, scales, device=self.device, **options)

    def weights(self, bits: int, iterations: int) -> None:
        """Nearest rounding and AdaRound, activations in float."""
        for method in ("minmax", "mse"):
            scales = self.scales(weight_bits=bits, weight_scale_method=method)
            self.record("weights", f"W{bits} nearest, {method}", lambda s=scales: self.decibels(s, act_quant=False))  # type: ignore[misc]
        if self._kept.time_is_up:
            return
        begin = time.monotonic()
        best = max(("minmax", "mse"), key=lambda m: self.figures["weights"][f"W{bits} nearest, {m}"] or 0.0)
        learned = self.learned(bits, best, iterations)
        self.record("weights", f"W{bits} AdaRound seconds", lambda: round(time.monotonic() - begin, 1))
        self.record("weights", f"W{bits} AdaRound", lambda: self.decibels(learned, act_quant=False))

    def learned(self, bits: int, weight_scale_method: str, iterations: int) -> Scales:
        """Scales with AdaRound's weights, kept beside the figures for `use_learned`."""
        file = self.out.with_suffix(f".w{bits}.safetensors")
        if file.exists():
            return load_scales(file, self.network, self.checkpoint.sha256)
        scales = self.scales(weight_bits=bits, weight_scale_method=weight_scale_method)
        part = self.out.with_suffix(f".w{bits}.part")
        options = AdaRoundOptions(iterations)
        scales = learn_weights(
            self.network,
            self.checkpoint,
            self.trajectories,
            scales=scales,
            options=options,
            seed=0,
            device=self.device,
            part=part,
        )
        save_scales(file, scales)
        part.unlink(missing_ok=True)
        return scales

    def use_learned(self, file: Path) -> None:
        """From now on W8 weights are rounded as a scales file of this checkpoint says."""
        scales = load_scales(file, self.network, self.checkpoint.sha256)
        if any(v.weight_bits != 8 or v.round_up is None for v in scales.layers.values() if v.mode != Mode.FLOAT):
            raise InputError(
                f"--learned {file} does not hold learned 8-bit weights; make it with `calibrate --rounding adaround`"
            )
        self._rounding = {n: {"round_up": v.round_up, "weight_scale": v.weight_scale} for n, v in scales.layers.items()}
        if self.figures.get("methods", self.figures.get("starts")) and "weights rounded by" not in self.figures:
            raise InputError(f"{self.out} holds figures of weights rounded to nearest; choose another --out")
        self.figures["weights rounded by"] = "AdaRound"

    def methods(self, bits: list[int]) -> None:
        for b in bits:
            for name, (method, granularity) in METHODS.items():
                scales = self.scales(method=method, granularity=granularity, act_bits=b, dither=False)
                if method == Method.MODIFF:
                    scales = two_rows(scales, 2)
                self.record("methods", f"{name} A{b}", lambda s=scales: self.decibels(s))  # type: ignore[misc]

    def static_scales(self, bits: list[int]) -> None:
        """Static residual scales by every method, with and without dither."""
        for b in bits:
            for dither in (True, False):
                for name, recipe in SCALE_RECIPES.items():
                    label = f"{name}{'' if dither else ', no dither'} A{b}"
                    scales = self.scales(act_bits=b, dither=dither, **recipe)
                    self.record("scales", label, lambda s=scales: self.decibels(s))  # type: ignore[misc]

    def rows(self, bits: list[int]) -> None:
        """Min-max grids, against static grids and then a grid for every row, found by trial on other noise."""
        trials = Trials(
            self.network,
            self.checkpoint,
            self.trajectories.timesteps,
            solver=self.trajectories.solver,
            images=16,
            seed=TRIAL_SEED,
            device=self.device,
        )
        for b in bits:
            recipe = Recipe(act_bits=b)
            scales = self.scales(act_bits=b)
            self.record("rows", f"min-max A{b}", lambda s=scales: self.decibels(s))  # type: ignore[misc]
            if self._kept.time_is_up or f"rows by trial A{b}" in self.figures["rows"]:
                continue
            parts = (self.network, self._on_device, self.trajectories, self.ranges, recipe)
            static = search_scales(
                trials, scales, {p: residual_scales(*parts, scales, p) for p in PERCENTILES}, report=typer.echo
            )
            self.record("rows", f"static by trial A{b}", lambda s=static: self.decibels(s))  # type: ignore[misc]
            rows = search_rows(trials, static, typer.echo)
            self.record("rows", f"rows by trial A{b}", lambda s=rows: self.decibels(s))  # type: ignore[misc]

    def states(self, bits: list[int]) -> None:
        """Types of the state, each against FP32 and against the same scales with the state in float64."""
        for b in bits:
            scales = self.scales(act_bits=b)
            exact = self._simulated(scales, dtype=torch.float64)
            wide = self._trials.sample(exact)
            for name, types in STATES.items():
                self.record("states", f"{name} A{b}", lambda s=scales, t=types, w=wide: self._state_figures(s, t, w))  # type: ignore[misc]

    def _state_figures(self, scales: Scales, types: dict[str, Any], wide: np.ndarray[Any, Any]) -> dict[str, float]:
        found = self._trials.sample(self._simulated(scales, between_passes=rounded_between(**types)))
        return {"to FP32": round(self._trials.against(found), 2), "to float64": round(psnr(found, wide), 2)}

    def starts(self, bits: list[int], names: list[str], percentile: float | None) -> None:
        grid: dict[str, Any] = {} if percentile is None else {"scale_method": "percentile", "percentile": percentile}
        if self.figures.setdefault("residual scales of the starts", grid) != grid:
            raise InputError(f"{self.out} holds starts on other residual scales; choose another --out")
        for b in bits:
            warm, exact = self.scales(act_bits=b, dither=False, **grid), self.scales(act_bits=b, start="exact", **grid)
            for name in names:
                scales, offset = STARTS[name](warm, exact)
                label = f"{name} A{b}"
                self.record("starts", label, lambda s=scales, o=offset: self.decibels(s, **o))  # type: ignore[misc]
                self.figures.setdefault("warm-up rows", {})[label] = scales.rows.warmup
        self._kept.write()


@refuses_bad_input
def main(
    config: Annotated[Path, typer.Option(help="DDIM configuration (.yml)")],
    ckpt: Annotated[Path, typer.Option(help="trained weights")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    timesteps: Annotated[int, typer.Option(help="DDIM steps")] = 50,
    skip_type: Annotated[Spacing, typer.Option(help="spacing of the timesteps")] = Spacing.QUAD,
    images: Annotated[int, typer.Option(help="images compared")] = 16,
    calibration_images: Annotated[int, typer.Option(help="images calibrated on")] = 16,
    parts: Annotated[str, typer.Option(help="comma-separated, of methods, scales, rows, starts, state, weights")] = PARTS,
    percentile: Annotated[float | None, typer.Option(help="starts: on percentile grids instead of min-max")] = None,
    bits: Annotated[str, typer.Option(help="activation bits, comma-separated")] = "8,6,4,3",
    weight_bits: Annotated[str, typer.Option(help="for the part weights")] = "8,4",
    learned: Annotated[Path | None, typer.Option(help="scales file whose W8 rounding methods and starts use")] = None,
    iterations: Annotated[int, typer.Option(help="AdaRound steps per block")] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seconds: Annotated[float, typer.Option(help="begin no new figure after this long")] = 1e9,
) -> None:
    """Measures methods, starts and weight rounding against FP32 in simulation."""
    widths = [int(b) for b in bits.split(",")]
    study = Study(
        config,
        ckpt,
        timesteps,
        images=images,
        calibration_images=calibration_images,
        device=device,
        out=out,
        deadline=seconds,
        skip_type=skip_type,
    )
    if learned is not None:
        study.use_learned(learned)
    for part in parts.split(","):
        if part == "methods":
            study.methods(widths)
        elif part == "scales":
            study.static_scales(widths)
        elif part == "rows":
            study.rows(widths)
        elif part == "state":
            study.states(widths)
        elif part == "starts":
            study.starts(widths, list(STARTS), percentile)
        elif part == "weights":
            for b in weight_bits.split(","):
                study.weights(int(b), iterations)
        else:
            raise InputError(f"--parts: unknown part '{part}'; known: methods, scales, rows, starts, state, weights")


if __name__ == "__main__":
    typer.run(main)
