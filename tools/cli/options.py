"""Options of the command line that several stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.core.kinds import FinalAlpha, Prediction, SolverKind, Spacing

Config = Annotated[Path | None, typer.Option(help="DDIM configuration (.yml)")]
Ckpt = Annotated[Path | None, typer.Option(help="trained weights (.safetensors, .ckpt, .pt, .pth)")]
Model = Annotated[Path | None, typer.Option(help="diffusers folder (a UNet and its scheduler), for --config and --ckpt")]
ContextFile = Annotated[
    Path | None,
    typer.Option("--context", help=".npz of what the network is given beside noise, by diffusers' names"),
]
Guidance = Annotated[
    float | None, typer.Option(help="classifier-free guidance: the context also has negative_encoder_hidden_states")
]
Weights = Annotated[
    str | None,
    typer.Option(help="raw or ema, of a checkpoint that has both; without it the EMA, where there is one"),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
BatchSize = Annotated[int, typer.Option(help="images computed together; the noise of an image does not depend on it")]
SolverName = Annotated[
    SolverKind | None,
    typer.Option("--solver", help="ddim, or dpmpp-2m (DPM-Solver++): as good with a third of the passes (ddim)"),
]
SpacingName = Annotated[
    Spacing | None, typer.Option("--spacing", "--skip-type", help="of the timesteps; logsnr suits dpmpp-2m (quad)")
]
PredictionName = Annotated[Prediction | None, typer.Option("--prediction", help="what the network says (epsilon)")]
ClipSample = Annotated[float | None, typer.Option("--clip-sample", help="limit of |x0| in every step (none)")]
StepsOffset = Annotated[int | None, typer.Option("--steps-offset", help="added to the timesteps of --spacing leading (0)")]
FinalAlphaName = Annotated[
    FinalAlpha | None,
    typer.Option("--final-alpha", help="ddim: the last step ends at no noise, or at the first timestep (one)"),
]
Seed = Annotated[int, typer.Option(help="image i starts from generator (seed, i)")]
