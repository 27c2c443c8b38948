"""`modiff-trt inspect`: what a scales file says, as a table, and as plots for those who ask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from modiff_trt.core.costs import ModeCurve
from modiff_trt.core.files import atomic_path
from modiff_trt.core.grid import grid_max
from modiff_trt.core.kinds import Granularity, Rounding
from modiff_trt.core.scales import Scales
from modiff_trt.networks.operations import Network
from modiff_trt.networks.state_elements import state_elements


def print_table(scales: Scales, network: Network) -> None:
    """One line per layer: mode, bits, scales, how much smaller the residual is, and its state."""
    grids = {Granularity.STATIC: "static", Granularity.TENSOR: "LTQ", Granularity.CHANNEL: "LCQ"}[scales.granularity]
    dither = f"{', dither' if scales.dither else ''}{', moving grids' if scales.moving_grids else ''}"
    recipe = f"{scales.method}, {grids} grids ({scales.scale_method}){dither}"
    split = ", skip halves apart" if any(layer.skip_ratio != 1 for layer in scales.layers.values()) else ""
    steps = f"{len(scales.rows.timesteps)} {scales.solver.kind} {scales.solver.spacing} steps, {len(scales.rows)} passes"
    table = Table(title=f"{recipe}{split}; {steps}; checkpoint {scales.checkpoint_sha256[:8]}, file {scales.file_sha256[:8]}")
    for heading in (
        "layer",
        "mode",
        "W",
        "A",
        "activation scale",
        "zero point",
        "residual scale",
        "range ratio",
        "rounding",
        "state, elements",
    ):
        table.add_column(heading, justify="left" if heading in ("layer", "mode", "rounding") else "right", no_wrap=True)
    elements = state_elements(scales, network)
    for column, (name, layer) in enumerate(scales.layers.items()):
        residual = float(scales.residual_range[:, column].max())
        ratio = float(scales.activation_range[:, column].max()) / residual if residual else float("inf")
        table.add_row(
            name,
            layer.mode,
            str(layer.weight_bits),
            str(layer.act_bits),
            f"{layer.activation_scale:.3g}",
            str(layer.activation_zero_point),
            f"{layer.residual_scale:.3g}",
            f"{ratio:.1f}x",
            Rounding.NEAREST if layer.round_up is None else Rounding.ADAROUND,
            f"{elements[name]:,}",
        )
    total = sum(elements.values())
    # A table is data: when it goes to a file or a pipe it must not be cut to the width of a terminal.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    Console().print(
        f"state: {total:,} elements an image, {total * 2 / 1e6:.1f} MB in float16, {total * 4 / 1e6:.1f} MB in float32"
    )
    if scales.curve is not None:
        print_curve(scales.curve)


def curve_rows(curve: ModeCurve) -> list[list[str]]:
    """A line for each mixture of modes that calibration tried: layers with state, time, speed, state and PSNR."""
    rows = []
    for number, point in enumerate(curve.points):
        speed = f"{curve.baseline / point.step_microseconds:.2f}x" if curve.baseline is not None else ""
        state, mark = f"{point.state_bytes / 1e6:.1f}", "chosen" if number == curve.chosen else ""
        rows.append([str(point.modulated), f"{point.step_microseconds:.2f}", speed, state, f"{point.decibels:.2f}", mark])
    return rows


CURVE_HEADINGS = ("layers with state", "us an image and step", "to floating point", "state, MB", "mean PSNR, dB", "")


def curve_title(curve: ModeCurve) -> str:
    """What the curve's times are of."""
    return f"modes, on {curve.device}" + (f" at batch {curve.batch}" if curve.batch else "")


def print_curve(curve: ModeCurve) -> None:
    """The mixtures of modes that calibration tried."""
    table = Table(title=curve_title(curve))
    for heading in CURVE_HEADINGS:
        table.add_column(heading, justify="right")
    for row in curve_rows(curve):
        table.add_row(*row)
    Console().print(table)


def save_curve(curve: ModeCurve, path: Path) -> Path:
    """Draws PSNR over time, a point for each mixture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    times, decibels = ([getattr(p, part) for p in curve.points] for part in ("step_microseconds", "decibels"))
    axis.plot(times, decibels, color="0.6", marker="o", markerfacecolor="white", markeredgecolor="black")
    axis.plot(times[curve.chosen], decibels[curve.chosen], "o", color="black", label="chosen")
    for point in curve.points:
        axis.annotate(
            str(point.modulated), (point.step_microseconds, point.decibels), (4, -11), textcoords="offset points", fontsize=8
        )
    axis.set_xlabel(f"microseconds an image and step ({curve.device})")
    axis.set_ylabel("PSNR to FP32, dB")
    axis.set_title("Layers with state (numbers), time and accuracy", fontsize=10)
    axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    return path


def save_plots(scales: Scales, folder: Path) -> list[Path]:
    """Writes ranges.png (all layers over the steps), layers.png (histogram and grid of chosen layers) and, where modes were
    chosen by measurement, modes.png."""
    from matplotlib.figure import Figure

    names = list(scales.layers)
    t = [scales.rows.timesteps[int(s)] for s in scales.range_steps]
    ranges = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, data, title in zip(
        ranges.subplots(1, 2, sharey=True),
        (scales.activation_range, scales.residual_range),
        ("activation", "residual: change since the previous step"),
        strict=True,
    ):
        # Step 0 has no residual: leave it out rather than draw a zero on a logarithmic axis.
        shown = np.where(data > 0, data, np.nan)
        axis.plot(range(len(t)), shown, color="0.7", linewidth=0.6)
        seen = [i for i in range(len(t)) if (data[i] > 0).any()]
        axis.plot(seen, [np.nanmedian(shown[i]) for i in seen], color="black", linewidth=2, label="median layer")
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("timestep t (noisiest first)")
        axis.set_xticks(range(0, len(t), max(1, len(t) // 8)), [str(t[i]) for i in range(0, len(t), max(1, len(t) // 8))])
        axis.legend()
    ranges.axes[0].set_ylabel("largest magnitude of the layer's input")

    chosen = names if len(names) <= 6 else [names[i] for i in np.linspace(0, len(names) - 1, 6).round().astype(int)]
    layers = Figure(figsize=(11, 6), layout="constrained")
    for axis, name in zip(layers.subplots(2, 3).flat, chosen, strict=False):
        index, layer = names.index(name), scales.layers[name]
        shares, top = scales.residual_histogram[index], float(scales.histogram_range[index])
        edges = np.linspace(0, top, len(shares) + 1)
        axis.stairs(shares, edges, fill=True, color="0.75")
        axis.set_yscale("log")
        reach = layer.residual_scale * grid_max(layer.act_bits)
        axis.axvline(reach, color="black", linestyle="--", label=f"end of the {layer.act_bits}-bit grid")
        axis.axvline(layer.residual_scale / 2, color="black", linestyle=":", label="rounds to zero below")
        axis.set_title(f"{name} ({layer.mode})", fontsize=9)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("|residual|")
    layers.axes[0].set_ylabel("share of values")
    layers.axes[0].legend(fontsize=8)
    paths = [folder / "ranges.png", folder / "layers.png"]
    for path, figure in zip(paths, (ranges, layers), strict=True):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    return paths if scales.curve is None else [*paths, save_curve(scales.curve, folder / "modes.png")]
