"""`modiff-trt calibrate`: the scales of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Granularity, Method, Mode, Modes, Residuals, Rounding, ScaleMethod, Search, Start
from modiff_trt.tools.cli.options import BatchSize, Ckpt, Config, Device, Model, Weights
from modiff_trt.tools.cli.presets import PRESETS, Preset

if TYPE_CHECKING:
    from modiff_trt.core.scales import Scales
    from modiff_trt.export.calibration.trials import Verdict

# Layers that do fewer multiply-accumulates an element mostly move data: in INT8 they gain nothing, and lose the most accuracy.
INTENSITY = 200.0
# Training steps of AdaRound, a block.
ITERATIONS = 1000
# PSNR in dB that modes chosen by measurement may lose.
MAX_LOSS = 0.5


def calibrate(
    *,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
    trajectories: Annotated[Path, typer.Option(help="file written by `collect`")],
    out: Annotated[Path, typer.Option(help="scales file to write (.safetensors)")],
    preset: Annotated[
        Preset,
        typer.Option(help="fast: no search; balanced: searches grids where they limit; exact: learned weights too"),
    ] = Preset.BALANCED,
    method: Annotated[Method, typer.Option(help="modulated residuals, or stateless (Q-Diffusion)")] = Method.MODIFF,
    weight_bit: Annotated[int, typer.Option(help="bits of the weights, 2 to 8")] = 8,
    act_bit: Annotated[int, typer.Option(help="bits of the activations, 2 to 8")] = 8,
    edge_bit: Annotated[int | None, typer.Option(help="at least so many bits for the first and last layer (--act-bit)")] = None,
    scale_method: Annotated[ScaleMethod | None, typer.Option(help="of residuals, --granularity static (minmax)")] = None,
    activation_method: Annotated[
        ScaleMethod | None,
        typer.Option(help="of activations without state, --granularity static: minmax, mse, percentile (mse)"),
    ] = None,
    weight_scale_method: Annotated[ScaleMethod, typer.Option(help="of weights: minmax or mse")] = ScaleMethod.MINMAX,
    residuals: Annotated[
        Residuals, typer.Option(help="measured between float steps, or against the quantized network's a_hat")
    ] = Residuals.FLOAT,
    split: Annotated[bool, typer.Option(help="a grid of its own for the skip half of a concatenated input")] = False,
    start: Annotated[
        Start, typer.Option(help="warmup rows, or exact: a full-precision first step (simulation only)")
    ] = Start.WARMUP,
    granularity: Annotated[
        Granularity, typer.Option(help="activation grids: static, tensor (LTQ) or channel (LCQ; simulation only)")
    ] = Granularity.STATIC,
    rounding: Annotated[
        Rounding | None, typer.Option(help="of the weights: nearest, or adaround (learned, block by block); (by --preset)")
    ] = None,
    iterations: Annotated[int, typer.Option(help="adaround: training steps per block")] = ITERATIONS,
    search: Annotated[
        Search | None,
        typer.Option(
            help="of residuals, by trial: static scales; rows: a grid a row too; auto: rows, unless weights limit (by --preset)"
        ),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="of --scale-method percentile: the share of values that a grid holds (0.9999)")
    ] = None,
    min_intensity: Annotated[
        float,
        typer.Option(
            help="leave layers in float that do fewer multiply-accumulates per element moved; 200: 1x1 and edge layers; 0: none"
        ),
    ] = INTENSITY,
    modes: Annotated[
        Modes, typer.Option(help="recipe: as the options say; auto: state only where it pays, by trial and by what it costs")
    ] = Modes.RECIPE,
    max_loss: Annotated[float | None, typer.Option(help="--modes auto: dB that the modes may lose, on average (0.5)")] = None,
    target_speed: Annotated[
        float | None, typer.Option(help="--modes auto: the best modes so many times as fast as floating point, by --costs")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="--modes auto: file of `bench --costs`; without it, costs are modelled for an H200")
    ] = None,
    costs_batch: Annotated[int | None, typer.Option(help="--costs: the batch size that counts (the largest)")] = None,
    trial_images: Annotated[
        int | None,
        typer.Option(help="images of trial trajectories, and of the PSNR said at the end; 0: none of both (by --preset)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="adaround: seed of its batches")] = 0,
    correct_bias: Annotated[
        bool | None,
        typer.Option(
            "--correct-bias/--no-correct-bias",
            help="take what rounding the weights adds on average from the biases (where trial images are nearer with it)",
        ),
    ] = None,
    dither: Annotated[
        bool, typer.Option(help="start a_hat from a random place inside the grid, and move grids of layers without state")
    ] = True,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    device: Device = "cpu",
) -> str | None:
    """Find the scales of every layer and write them to a scales file."""
    from modiff_trt.core.costs import load_costs
    from modiff_trt.core.files import check_writable
    from modiff_trt.core.scales import only_simulated, save_scales
    from modiff_trt.export.calibration.adaround import AdaRoundOptions
    from modiff_trt.export.calibration.biases import correct_biases
    from modiff_trt.export.calibration.modes import Goal, modelled_costs, possible_changes, reach_goal
    from modiff_trt.export.calibration.pipeline import (
        JUDGE_SEED,
        TRIAL_SEED,
        choose_modes,
        improve,
        learn_weights,
        measure,
        refit_residuals,
        residual_scales,
    )
    from modiff_trt.export.calibration.reconstruct import units
    from modiff_trt.export.calibration.static import Recipe, make_scales
    from modiff_trt.export.calibration.trajectories import load_trajectories
    from modiff_trt.export.calibration.trials import PERCENTILES, Trials, judge
    from modiff_trt.runtime.backends.registry.options import check_device, load_model
    from modiff_trt.runtime.sampling import check_seed
    from modiff_trt.tools.provenance import peak_memory
    from modiff_trt.tools.report.inspecting import print_curve

    choices, searchable = PRESETS[preset], method == Method.MODIFF and granularity == Granularity.STATIC
    rounding = choices.rounding if rounding is None else rounding
    trial_images = choices.trial_images if trial_images is None else trial_images
    if search is None:
        # Scales found by a method of the user's choice stay as they are.
        search = choices.search if searchable and trial_images and scale_method is None else Search.NONE
    if search != Search.NONE and not searchable:
        raise InputError("--search is for --method modiff with --granularity static")
    auto = modes == Modes.AUTO
    if auto and method != Method.MODIFF:
        raise InputError("--modes auto takes state from layers, which --method modiff gives them")
    if not auto and any(value is not None for value in (max_loss, target_speed, costs, costs_batch)):
        raise InputError("--max-loss, --target-speed, --costs and --costs-batch are for --modes auto")
    if max_loss is not None and target_speed is not None:
        raise InputError("pass --max-loss or --target-speed, not both: one asks for the fastest modes, the other for the best")
    if (target_speed is not None or costs_batch is not None) and costs is None:
        raise InputError("--target-speed and --costs-batch need --costs, a file of `bench --costs`")
    if not (max_loss is None or max_loss >= 0) or not (target_speed is None or target_speed > 0):
        raise InputError("--max-loss must not be negative, and --target-speed be more than 0")
    if trial_images < (1 if auto or search != Search.NONE else 0):
        raise InputError("--trial-images must be at least 1 for --search and --modes auto")
    if iterations < 1 or batch_size < 1:
        raise InputError("--iterations and --batch-size must be at least 1")
    if percentile is not None and ScaleMethod.PERCENTILE not in (scale_method, activation_method):
        raise InputError(
            "--percentile is for --scale-method or --activation-method percentile; `--search scales` finds a share by itself"
        )
    if method == Method.QDIFF and scale_method is not None:
        raise InputError("--scale-method is of residuals, which --method qdiff has none of; pass --activation-method")
    if granularity != Granularity.STATIC and activation_method is not None:
        raise InputError("--activation-method is for --granularity static: other grids span each image's own values")
    check_seed(seed)
    recipe = Recipe(
        method=method,
        weight_bits=weight_bit,
        act_bits=act_bit,
        scale_method=scale_method or ScaleMethod.MINMAX,
        activation_method=activation_method or ScaleMethod.MSE,
        weight_scale_method=weight_scale_method,
        start=start,
        edge_bits=edge_bit,
        granularity=granularity,
        dither=dither,
        split=split,
        residuals=residuals,
        percentile=percentile if percentile is not None else Recipe().percentile,
        min_intensity=min_intensity,
    )
    check_writable(out)
    part = out.with_name(out.name + ".part")
    network, checkpoint = load_model(config, ckpt, weights, model=model)
    known = load_costs(costs, [spec.name for spec in network.layers], costs_batch) if costs is not None else None
    if target_speed is not None and (known is None or known.baseline is None):
        raise InputError(f"{costs} has no network in floating point at this batch size; write it again with one")
    stored = load_trajectories(trajectories, network.config, checkpoint.sha256)
    kept_ranges = out.with_name(out.name + ".ranges.part")
    ranges = measure(network, checkpoint, stored, batch_size=batch_size, device=check_device(device), part=kept_ranges)
    on_device = replace(checkpoint, params={key: value.to(device) for key, value in checkpoint.params.items()})
    scales = make_scales(network, on_device, stored, ranges=ranges, recipe=recipe)
    goal = None
    if auto:
        limit = known.baseline / target_speed if known and known.baseline and target_speed else None
        prices = known or modelled_costs(network, scales)
        goal = Goal(prices, max_loss=MAX_LOSS if max_loss is None else max_loss, microseconds=limit)
        reach_goal(scales, goal, possible_changes(scales, prices))  # before what takes long
        if doubt := prices.doubt():
            typer.echo(doubt)
    if rounding == Rounding.ADAROUND:
        scales = learn_weights(
            network, checkpoint, stored, scales=scales, options=AdaRoundOptions(iterations), seed=seed, device=device, part=part
        )
    try_images = partial(
        Trials,
        network,
        checkpoint,
        scales.rows.timesteps,
        solver=scales.solver,
        seed=TRIAL_SEED,
        device=device,
        context=stored.context,
    )
    kept_trials, kept_modes, kept_others = (out.with_name(f"{out.name}.{part}.part") for part in ("trials", "modes", "others"))
    trials = try_images(images=trial_images, kept=kept_trials) if trial_images else None
    if correct_bias is not False:
        corrected = correct_biases(network, checkpoint.params, scales, ranges)
        if correct_bias is None and trials:
            before, after = (trials.weights_alone(tried) for tried in (scales, corrected))
            typer.echo(f"biases: with exact activations {before:.1f} dB, corrected {after:.1f} dB")
            corrected = corrected if after > before else scales
        scales = corrected
    if scales.modulated and (residuals == Residuals.QUANTIZED or scale_method == ScaleMethod.LEARNED):
        scales = refit_residuals(
            network, checkpoint, stored, scales=scales, recipe=recipe, batch_size=batch_size, device=device
        )
    verdict = None
    if trials and search == Search.AUTO:
        verdict = judge(trials, scales)
        if verdict.weights_limit:
            typer.echo("search: none, since the weights limit the image")
            search = Search.NONE
    if trials and scales.modulated and search != Search.NONE:
        verdict = None
        candidates = {
            p: residual_scales(network, on_device, stored, ranges=ranges, recipe=recipe, scales=scales, percentile=p)
            for p in PERCENTILES
        }
        scales = improve(trials, scales, candidates, rows=search != Search.SCALES)
    if trials and goal is not None:
        alone = try_images(images=max(1, trial_images // 2), kept=kept_modes)
        others = try_images(images=trial_images, seed=JUDGE_SEED, kept=kept_others)
        scales = choose_modes(trials, scales, goal, alone=alone, others=others)
        verdict = judge(others, scales)
        assert scales.curve is not None
        print_curve(scales.curve)
        if goal.microseconds is None and (advice := scales.curve.advice()):
            typer.echo(advice)
    save_scales(out, scales)
    kept = [layer.mode for layer in scales.layers.values()]
    counts = ", ".join(f"{kept.count(mode)} {mode}" for mode in Mode if mode in kept)
    only = "; for torch-sim only" if only_simulated(scales) is not None else ""
    took = f"at most {peak_memory(device) / 1e9:.1f} GB of memory"
    typer.echo(
        f"{out}: {method} W{weight_bit}A{act_bit}, layers: {counts}; {len(scales.rows)} passes a trajectory{only}; {took}"
    )
    said = None
    if trials:
        verdict = verdict or judge(trials, scales)
        work = Work(trial_images * len(scales.rows), len(stored.chosen) * stored.x.shape[1], len(units(network)))
        said = _verdict(verdict, scales, f"{trial_images} {'trial' if goal is None else 'other'} images", work)
        typer.echo(said)
    for done in (kept_ranges, kept_trials, kept_modes, kept_others, *([part] if rounding == Rounding.ADAROUND else [])):
        done.unlink(missing_ok=True)
    return said


@dataclass(frozen=True)
class Work:
    """What the price of an option is reckoned from: passes of one image in a trial, AdaRound's samples, and its blocks."""

    passes: int
    samples: int
    blocks: int

    def adaround_seconds(self, trial_seconds: float, iterations: int) -> float:
        """An iteration runs a block forward and back for a batch: of all blocks, three passes. Before each block the network is
        run up to it, with and without rounding, for every sample: half a pass each."""
        from modiff_trt.export.calibration.adaround import AdaRoundOptions

        one = trial_seconds / self.passes
        return one * (3 * AdaRoundOptions().batch_size * iterations + self.blocks * self.samples)


def _verdict(found: Verdict, scales: Scales, images: str, work: Work) -> str:
    """What the PSNR on these images is, what limits it, and the option that helps most, with its price."""
    from modiff_trt.export.calibration.trials import SEARCH_TRIALS

    beside = "" if found.stateless is None else f", without state (Q-Diffusion) {found.stateless:.1f}"
    said = f"PSNR of {images} to FP32: {found.decibels:.1f} dB; with exact activations {found.weights_alone:.1f}{beside}"
    if not math.isfinite(found.decibels):
        return f"the {images} are not finite: these scales do not work; try a larger --act-bit or --weight-bit"
    layers = [layer for layer in scales.layers.values() if layer.mode != Mode.FLOAT]
    if found.weights_limit:
        learned = all(layer.round_up is not None for layer in layers)
        price = _duration(work.adaround_seconds(found.seconds, ITERATIONS))
        help_with = "more `collect --num-samples`, and --iterations" if learned else f"--rounding adaround ({price})"
        return f"{said}. The weights limit it; what helps: {help_with}"
    if scales.method == Method.QDIFF:
        help_with = "--method modiff"
    elif scales.granularity == Granularity.STATIC and (scales.rows.multipliers[scales.rows.warmup :] == 1).all():
        help_with = f"--search rows ({_duration(SEARCH_TRIALS * found.seconds)}), or --granularity tensor"
    else:
        help_with = "a larger --act-bit" if min(layer.act_bits for layer in layers) < 8 else "more steps"
    return f"{said}. The activations limit it; what helps: {help_with}"


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"
