"""`modiff-trt calibrate`: the scales of every layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Granularity, Method, Mode, Residuals, Rounding, ScaleMethod, Search, Start
from modiff_trt.tools.cli.options import BatchSize, Ckpt, Config, Device, Weights


def calibrate(
    config: Config,
    ckpt: Ckpt,
    trajectories: Annotated[Path, typer.Option(help="file written by `collect`")],
    out: Annotated[Path, typer.Option(help="scales file to write (.safetensors)")],
    method: Annotated[Method, typer.Option(help="modulated residuals, or stateless (Q-Diffusion)")] = Method.MODIFF,
    weight_bit: Annotated[int, typer.Option(help="bits of the weights, 2 to 8")] = 8,
    act_bit: Annotated[int, typer.Option(help="bits of the activations, 2 to 8")] = 8,
    edge_bit: Annotated[int | None, typer.Option(help="at least so many bits for the first and last layer")] = None,
    scale_method: Annotated[
        ScaleMethod, typer.Option(help="of activations and residuals; learned: of residuals alone")
    ] = ScaleMethod.MINMAX,
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
        Rounding, typer.Option(help="of the weights: nearest, or adaround (learned, block by block)")
    ] = Rounding.NEAREST,
    iterations: Annotated[int, typer.Option(help="adaround: training steps per block")] = 1000,
    search: Annotated[Search, typer.Option(help="by trial: static grids, then one a row")] = Search.NONE,
    percentile: Annotated[
        float | None, typer.Option(help="of --scale-method percentile: the share of values that a grid holds (0.9999)")
    ] = None,
    min_intensity: Annotated[
        float,
        typer.Option(
            help="leave layers in float that do fewer multiply-accumulates per element moved; 200: 1x1 and edge layers"
        ),
    ] = 0.0,
    auto: Annotated[bool, typer.Option("--auto", help="take the state from layers that do not need it")] = False,
    max_loss: Annotated[float, typer.Option(help="auto: PSNR that may be lost, dB")] = 0.3,
    trial_images: Annotated[int, typer.Option(help="images of the trial trajectories of --search and --auto")] = 4,
    seed: Annotated[int, typer.Option(help="adaround: seed of its batches")] = 0,
    dither: Annotated[bool, typer.Option(help="start a_hat from a random place inside the grid")] = True,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Find the scales of every layer and write them to a scales file."""
    from modiff_trt.core.files import check_writable
    from modiff_trt.core.scales import only_simulated, save_scales
    from modiff_trt.export.calibration.adaround import AdaRoundOptions
    from modiff_trt.export.calibration.pipeline import (
        TRIAL_SEED,
        improve,
        learn_weights,
        measure,
        refit_residuals,
        residual_scales,
    )
    from modiff_trt.export.calibration.static import Recipe, make_scales
    from modiff_trt.export.calibration.trajectories import load_trajectories
    from modiff_trt.export.calibration.trials import PERCENTILES, Trials
    from modiff_trt.runtime.backends.registry.options import check_device, load_model
    from modiff_trt.runtime.sampling import check_seed

    if search != Search.NONE and (method != Method.MODIFF or granularity != Granularity.STATIC):
        raise InputError("--search is for --method modiff with --granularity static")
    if auto and method != Method.MODIFF:
        raise InputError("--auto takes state from layers, which --method modiff gives them")
    if trial_images < 1 or not max_loss >= 0:
        raise InputError("--trial-images must be at least 1 and --max-loss not negative")
    if iterations < 1 or batch_size < 1:
        raise InputError("--iterations and --batch-size must be at least 1")
    if percentile is not None and scale_method != ScaleMethod.PERCENTILE:
        raise InputError("--percentile is for --scale-method percentile; `--search scales` finds a share by itself")
    check_seed(seed)
    recipe = Recipe(
        method=method,
        weight_bits=weight_bit,
        act_bits=act_bit,
        scale_method=scale_method,
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
    network, checkpoint = load_model(config, ckpt, weights)
    stored = load_trajectories(trajectories, network.config, checkpoint.sha256)
    ranges = measure(network, checkpoint, stored, batch_size, check_device(device))
    on_device = replace(checkpoint, params={key: value.to(device) for key, value in checkpoint.params.items()})
    scales = make_scales(network, on_device, stored, ranges=ranges, recipe=recipe)
    if rounding == Rounding.ADAROUND:
        scales = learn_weights(
            network, checkpoint, stored, scales=scales, options=AdaRoundOptions(iterations), seed=seed, device=device, part=part
        )
    if scales.modulated and (residuals == Residuals.QUANTIZED or scale_method == ScaleMethod.LEARNED):
        scales = refit_residuals(
            network, checkpoint, stored, scales=scales, recipe=recipe, batch_size=batch_size, device=device
        )
    if scales.modulated and (search != Search.NONE or auto):
        trials = Trials(
            network,
            checkpoint,
            scales.rows.timesteps,
            solver=scales.solver,
            images=trial_images,
            seed=TRIAL_SEED,
            device=device,
        )
        tried = PERCENTILES if search != Search.NONE else ()
        candidates = {
            p: residual_scales(network, on_device, stored, ranges=ranges, recipe=recipe, scales=scales, percentile=p)
            for p in tried
        }
        scales = improve(trials, scales, candidates, rows=search == Search.ROWS, max_loss=max_loss if auto else None)
    save_scales(out, scales)
    if rounding == Rounding.ADAROUND:
        part.unlink(missing_ok=True)
    modes = [layer.mode for layer in scales.layers.values()]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in Mode if mode in modes)
    only = "; for torch-sim only" if only_simulated(scales) is not None else ""
    typer.echo(f"{out}: {method} W{weight_bit}A{act_bit}, layers: {counts}; {len(scales.rows)} passes a trajectory{only}")
