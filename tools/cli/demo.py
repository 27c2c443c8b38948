"""`modiff-trt demo`: the whole path with the shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.tools.cli.options import Seed

DEMO_OUT = Path("out/demo")


def demo(
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="folder for the picture and the figures")] = DEMO_OUT,
    num_samples: Annotated[int, typer.Option(help="images per row")] = 8,
    seed: Seed = 0,
) -> None:
    """FP32, Q-Diffusion and MoDiff at 8 and 6 bits from the same noise, with the model that ships with this program."""
    from modiff_trt.tools.demo import run

    run(out, num_samples, seed)
