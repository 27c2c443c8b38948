"""Draws results/starts.png from a study file: `python -m modiff_trt.tools.research.start_figure results/study50.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path, read_json

SHOWN = {
    "exact (the paper)": "exact: the paper's start",
    "two rows, 2/Q": "two warm-up rows, the second at 2/Q",
    "ladder 1/Q to 1": "warm-up rows down to the running grid",
    "exact, offset 1/4": "exact, then a random offset of +-1/4 step",
    "exact, offset 1/2": "exact, then a random offset of +-1/2 step",
    "exact, noise 1/2 every step": "a fresh offset at every step (one more convolution a layer)",
}
MARKERS = "ovs^Dx"


def main(study: Annotated[Path, typer.Argument(help="JSON file that `study` wrote")]) -> None:
    """Writes starts.png beside the study file."""
    try:
        data = read_json(study, "study")
        starts = data["starts"]
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axis = figure.subplots()
        for marker, (name, label) in zip(MARKERS, SHOWN.items(), strict=True):
            bits = [b for b in (3, 4, 6, 8) if starts.get(f"{name} A{b}") is not None]
            axis.plot(bits, [starts[f"{name} A{b}"] for b in bits], marker=marker, label=label)
        axis.axhline(data["weights"]["W8 nearest, minmax"], color="black", linestyle=":", label="quantized weights alone")
        axis.set_xlabel("bits of the activations")
        axis.set_ylabel("PSNR to FP32, dB")
        axis.set_xticks([3, 4, 6, 8])
        axis.set_title(f"MoDiff, static scales, {data['timesteps']} steps, {data['images']} images", fontsize=10)
        axis.legend(fontsize=8)
        with atomic_path(study.parent / "starts.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    except (InputError, KeyError) as error:
        typer.echo(f"error: {study} cannot be drawn: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
