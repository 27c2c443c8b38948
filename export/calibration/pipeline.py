"""The jobs of calibration, under progress bars: measuring ranges, and learning the rounding of weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from modiff_trt.core.files import kept_arrays, save_arrays
from modiff_trt.core.kinds import Mode, ScaleMethod
from modiff_trt.core.progress import progress_bar
from modiff_trt.core.scales import Scales
from modiff_trt.export.calibration.adaround import AdaRoundOptions
from modiff_trt.export.calibration.modes import Goal, possible_changes, search_modes
from modiff_trt.export.calibration.ranges import LayerRanges, kept_ranges, measure_ranges, ranges_to_arrays
from modiff_trt.export.calibration.reconstruct import Samples, Unit, WeightGrid, reconstruct
from modiff_trt.export.calibration.residuals import learn_residual_scale, refit
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.calibration.trajectories import Trajectories
from modiff_trt.export.calibration.trials import MARGINS, Trials, search_rows, search_scales
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.modulated import LayerState, QuantizedLayer
from modiff_trt.networks.operations import Network
from modiff_trt.networks.quantizers import RangeHistogram, pack_rounding, unpack_rounding
from modiff_trt.networks.torch_ops import layer_weight
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.torch_denoiser import full_precision
from modiff_trt.runtime.sampler import sample_trajectory

ROUNDING_KIND, ROUNDING_SCHEMA = "rounding", 1
RANGES_KIND, RANGES_SCHEMA = "ranges", 2
# Seconds of measuring that an interruption may cost.
KEEP_EVERY = 15.0
# Trials run on noise that neither calibration (seed 1) nor the default sampling (seed 0) uses.
TRIAL_SEED = 2
# What was chosen among mixtures of modes is judged on other noise again: on its own it comes out too well.
JUDGE_SEED = 3


def measure(
    network: Network, checkpoint: Checkpoint, trajectories: Trajectories, *, batch_size: int, device: str, part: Path
) -> dict[str, LayerRanges]:
    """`measure_ranges` on a device.

    What is measured stands in `part`, at most KEEP_EVERY seconds and a step behind; a second call with the same settings goes
    on from there and ends with the same ranges. The caller removes `part`.
    """
    params = {key: value.to(device) for key, value in checkpoint.params.items()}
    header = {
        "kind": RANGES_KIND,
        "schema": RANGES_SCHEMA,
        "checkpoint_sha256": checkpoint.sha256,
        "trajectories": _digest(trajectories),
        "batch_size": batch_size,
        "device": device,
    }
    kept_at = time.monotonic()

    def keep(ranges: dict[str, LayerRanges]) -> None:
        nonlocal kept_at
        if time.monotonic() - kept_at >= KEEP_EVERY:
            save_arrays(part, header, ranges_to_arrays(ranges))
            kept_at = time.monotonic()

    with progress_bar() as bar:

        def steps(items: Iterator[int], total: int) -> Iterator[int]:
            return iter(bar.track(items, total=total, description="ranges"))

        with full_precision():
            return measure_ranges(
                network,
                params,
                trajectories,
                batch_size=batch_size,
                progress=steps,
                begun=kept_ranges(network, kept_arrays(part, header)),
                on_step=keep,
            )


def learn_weights(
    network: Network,
    checkpoint: Checkpoint,
    trajectories: Trajectories,
    scales: Scales,
    options: AdaRoundOptions,
    seed: int,
    device: str,
    part: Path,
) -> Scales:
    """The same scales with AdaRound's rounding of every weight, learned on the stored trajectories.

    What is finished stands in `part`, block by block; a second call with the same settings goes on from there and ends
    with the same decisions. The caller removes `part` once it has saved the result.
    """
    params = {key: value.to(device) for key, value in checkpoint.params.items()}
    grids = {
        name: WeightGrid(torch.from_numpy(layer.weight_scale).to(device), layer.weight_bits, layer.skip_ratio)
        for name, layer in scales.layers.items()
        if layer.mode != Mode.FLOAT
    }
    weights = {spec.name: layer_weight(spec, params) for spec in network.layers}
    header = {
        "kind": ROUNDING_KIND,
        "schema": ROUNDING_SCHEMA,
        "checkpoint_sha256": checkpoint.sha256,
        "trajectories": [trajectories.seed, list(trajectories.x.shape), list(trajectories.timesteps), _digest(trajectories)],
        "weight_bits": {name: scales.layers[name].weight_bits for name in grids},
        "scale_method": scales.scale_method,
        "skip_ratios": {name: layer.skip_ratio for name, layer in scales.layers.items() if layer.skip_ratio != 1.0},
        "options": asdict(options),
        "seed": seed,
    }
    packed = kept_arrays(part, header)
    done = {name: up for name, bits in packed.items() if (up := unpack_rounding(bits, weights[name])) is not None}

    def keep(unit: Unit, found: dict[str, Tensor], loss: float) -> None:
        packed.update({name: pack_rounding(up) for name, up in found.items()})
        save_arrays(part, header, packed)

    with progress_bar() as bar:

        def blocks(items: Iterator[Unit], total: int) -> Iterator[Unit]:
            return iter(bar.track(items, total=total, description="adaround"))

        with full_precision():
            reconstruct(
                network,
                params,
                grids,
                samples=_samples(trajectories),
                options=options,
                seed=seed,
                done=done,
                on_unit=keep,
                progress=blocks,
            )
    return replace(scales, layers={n: replace(layer, round_up=packed.get(n)) for n, layer in scales.layers.items()})


def refit_residuals(
    network: Network,
    checkpoint: Checkpoint,
    trajectories: Trajectories,
    scales: Scales,
    recipe: Recipe,
    batch_size: int,
    device: str,
) -> Scales:
    """Residual scales again, from whole trajectories of the network that these scales quantize.

    The recipe's scale method `learned` trains them on layer outputs at the chosen steps, of the first `batch_size` images.
    """
    method = recipe.scale_method
    histograms = {name: RangeHistogram() for name in scales.modulated}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in scales.modulated}
    chosen = {int(step) + scales.rows.warmup for step in trajectories.chosen if step > 0}
    # An exact start meets the whole activation in its first row.
    first = scales.rows.warmup + int(scales.rows.exact_start)
    row, keep = 0, True

    def watch(layer: QuantizedLayer, x: Tensor, state: LayerState) -> None:
        if row >= first:
            histograms[layer.spec.name].update(x - state.a_hat)
        if method == ScaleMethod.LEARNED and keep and row in chosen:
            kept[layer.spec.name].append((x[row % len(x)].cpu(), state.a_hat[row % len(x)].cpu()))

    def on_pass(done: int, x: Tensor, eps: Tensor) -> None:
        nonlocal row
        row = done + 1

    context = trajectories.context
    simulated = trained.simulated(network, checkpoint.params, scales, device=device, on_layer=watch)
    denoiser = guided(simulated, context)
    updates = scales.solver.updates(network.config.diffusion, scales.rows.timesteps)
    start = trajectories.x[0]
    for begin in range(0, len(start), batch_size):
        row, keep = 0, begin == 0
        x_start = start[begin : begin + batch_size]
        lines = context.of(range(begin, begin + len(x_start)))
        sample_trajectory(denoiser, updates, x_start, context=lines, on_pass=on_pass)
    found = {name: h.scale(method, scales.layers[name].act_bits, recipe.percentile) for name, h in histograms.items()}
    if method == ScaleMethod.LEARNED:
        with progress_bar() as bar:
            for name in bar.track(scales.modulated, description="residual scales"):
                layer = replace(simulated.layers[name], scale=found[name])
                x, a_hat = (torch.stack(part).to(device) for part in zip(*kept.pop(name), strict=True))
                with full_precision():
                    found[name] = learn_residual_scale(layer, x, a_hat)
    return refit(scales, found)


def residual_scales(
    network: Network,
    checkpoint: Checkpoint,
    trajectories: Trajectories,
    ranges: dict[str, LayerRanges],
    recipe: Recipe,
    scales: Scales,
    percentile: float,
) -> dict[str, float]:
    """The residual scales that a recipe would give with another percentile, by layer, in the units of `scales`."""
    recipe = replace(recipe, scale_method=ScaleMethod.PERCENTILE, percentile=percentile)
    found = make_scales(network, checkpoint, trajectories, ranges=ranges, recipe=recipe).layers
    # Where the skip half has its own grid, the weights of `scales` are folded with its ratio of the halves.
    return {n: found[n].residual_scale * max(1.0, found[n].skip_ratio / scales.layers[n].skip_ratio) for n in scales.modulated}


def improve(trials: Trials, scales: Scales, candidates: dict[float, dict[str, float]], rows: bool) -> Scales:
    """Calibration by trial: residual scales, then a row table.

    `candidates` are residual scales by percentile for `search_scales`; none leaves the scales as they are. Prints what was
    tried.
    """
    console = Console(highlight=False)
    with progress_bar() as bar:
        lines = (len(candidates) + 3 if candidates else 0) + (2 * len(MARGINS) + 2 if rows else 0)
        task = bar.add_task("search", total=lines, unit="trials", visible=lines > 0)

        def report(text: str) -> None:
            console.print(text)
            bar.advance(task)

        if candidates:
            scales = search_scales(trials, scales, candidates, report=report)
        if rows:
            scales = search_rows(trials, scales, report)
    return scales


def choose_modes(trials: Trials, scales: Scales, goal: Goal, *, alone: Trials, others: Trials) -> Scales:
    """`search_modes` under a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task("modes", total=len(possible_changes(scales, goal.costs)), unit="changes")
        console = Console(highlight=False)
        found = search_modes(
            trials, scales, goal, alone=alone, others=others, report=console.print, on_trial=lambda: bar.advance(task)
        )
    return found


def _samples(trajectories: Trajectories) -> Samples:
    """Every stored image at every stored step, once for each side of guidance."""
    context, (steps, images) = trajectories.context, trajectories.x.shape[:2]
    seen = images * context.copies
    x = torch.from_numpy(trajectories.x).repeat(1, context.copies, 1, 1, 1).flatten(0, 1)
    t = torch.tensor([trajectories.timesteps[int(s)] for s in trajectories.steps]).repeat_interleave(seen)
    return Samples(x, t, torch.arange(seen).repeat(steps), context.of(range(images)))


def _digest(trajectories: Trajectories) -> str:
    digest = hashlib.sha256(trajectories.x.tobytes() + trajectories.steps.tobytes())
    for name, value in sorted(trajectories.context.of(range(trajectories.x.shape[1])).items()):
        digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()
