"""`modiff-trt inspect`: what a scales file decided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    scales: Annotated[Path, typer.Argument(help="scales file")],
    plots: Annotated[Path | None, typer.Option(help="folder to draw ranges.png, layers.png and modes.png into")] = None,
) -> None:
    """Show what a scales file decided for every layer."""
    from modiff_trt.core.scales import load_scales
    from modiff_trt.networks.unet2d import trace
    from modiff_trt.tools.report.inspecting import print_table, save_plots

    loaded = load_scales(scales)
    print_table(loaded, trace(loaded.config))
    for path in save_plots(loaded, plots) if plots is not None else []:
        typer.echo(str(path))
