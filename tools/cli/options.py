"""Options of the command line that several stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option(help="DDIM configuration (.yml)")]
Ckpt = Annotated[Path, typer.Option(help="trained weights (.safetensors, .ckpt, .pt, .pth)")]
Weights = Annotated[
    str | None,
    typer.Option(help="raw or ema, of a checkpoint that has both; without it the EMA, where there is one"),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
BatchSize = Annotated[int, typer.Option(help="images computed together; the noise of an image does not depend on it")]
Seed = Annotated[int, typer.Option(help="image i starts from generator (seed, i)")]
