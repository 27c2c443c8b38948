"""`modiff-trt collect`: full-precision trajectories for calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.tools.cli.options import (
    BatchSize,
    Ckpt,
    ClipSample,
    Config,
    ContextFile,
    Device,
    FinalAlphaName,
    Guidance,
    Model,
    PredictionName,
    Seed,
    SolverName,
    SpacingName,
    StepsOffset,
    Weights,
)


def collect(
    *,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="trajectory file to write (.safetensors)")],
    timesteps: Annotated[int, typer.Option(help="steps of the solver")] = 100,
    solver: SolverName = None,
    spacing: SpacingName = None,
    prediction: PredictionName = None,
    clip_sample: ClipSample = None,
    steps_offset: StepsOffset = None,
    final_alpha: FinalAlphaName = None,
    context: ContextFile = None,
    guidance: Guidance = None,
    num_samples: Annotated[int, typer.Option(help="calibration images")] = 16,
    calib_steps: Annotated[int, typer.Option(help="steps to keep, spread evenly; each with the step before it")] = 20,
    seed: Seed = 1,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Sample in full precision and store the trajectories that calibration needs."""
    from modiff_trt.core.context import load_context
    from modiff_trt.export.calibration.collecting import collect as run
    from modiff_trt.runtime.backends.registry.options import check_device, default_solver, load_model
    from modiff_trt.runtime.backends.registry.steps import SolverOptions

    network, checkpoint = load_model(config, ckpt, weights, model=model)
    if checkpoint.description:
        typer.echo(f"checkpoint: {checkpoint.description}")
    result = run(
        network,
        checkpoint,
        timesteps=timesteps,
        solver=SolverOptions(
            solver, spacing, prediction, clip_sample=clip_sample, steps_offset=steps_offset, final_alpha=final_alpha
        ).over(default_solver(config, model)),
        num_samples=num_samples,
        calib_steps=calib_steps,
        seed=seed,
        batch_size=batch_size,
        device=check_device(device),
        out=out,
        context=load_context(context, guidance, network.config.architecture),
    )
    typer.echo(f"{out}: {num_samples} images at {len(result.steps)} of {len(result.timesteps)} steps")
