"""Draws solvers.png beside a study: `python -m modiff_trt.tools.research.solver_figure results/solver_study_h200.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path, read_json
from modiff_trt.tools.report.keyed_tables import by_steps

MARKERS = "ovs^Dx"


def main(study: Annotated[Path, typer.Argument(help="JSON file that `solver_study` wrote")]) -> None:
    """Writes solvers.png beside the study file: FD-CIFAR over microseconds an image, a line a method."""
    try:
        data = read_json(study, "study")
        lines = {
            name: [(steps, found["microseconds_an_image"], found["fd_cifar"]) for steps, found in line.items()]
            for name, line in by_steps(data["quality"]).items()
        }
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axis = figure.subplots()
        for marker, (name, points) in zip(MARKERS, lines.items(), strict=False):
            axis.plot([time for _, time, _ in points], [distance for _, _, distance in points], marker=marker, label=name)
            for steps, time, distance in points[:: max(len(points) - 1, 1)]:
                axis.annotate(f"{steps}", (time, distance), textcoords="offset points", xytext=(4, 5), fontsize=8)
        steps, time, distance = next(iter(lines.values()))[-1]
        label = f"DDIM in floating point, {steps} steps"
        axis.plot([time], [distance], marker="*", markersize=16, color="black", linestyle="none", label=label)
        axis.axhline(distance, color="black", linestyle=":", linewidth=0.8)
        axis.set_xscale("log")
        ticks = [time for time in (200, 300, 500, 1000, 2000, 4000) if axis.get_xlim()[0] < time < axis.get_xlim()[1]]
        axis.set_xticks(ticks, [str(time) for time in ticks])
        axis.minorticks_off()
        axis.set_xlabel("microseconds an image (numbers: steps)")
        axis.set_ylabel("FD-CIFAR to the training images")
        axis.set_title(f"{data['fd_images']} images, one {data['machine'].get('gpu', 'CPU')}", fontsize=10)
        axis.legend(fontsize=8)
        with atomic_path(study.parent / "solvers.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    except (InputError, KeyError, StopIteration) as error:
        typer.echo(f"error: {study} cannot be drawn: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
