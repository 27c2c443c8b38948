"""The report's plots: matplotlib's SVG, whose ink takes the page's colour so that it suits light and dark."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
from PIL import Image

from modiff_trt.core.costs import ModeCurve
from modiff_trt.core.scales import Scales
from modiff_trt.tools.report.data import Comparison

# Stands for the page's own colour; nothing else has it.
INK = "#010203"
STYLES = (("#3b82c4", "-", "o"), ("#d97706", "--", "s"), ("#0f9d77", ":", "^"), ("#b0579b", "-.", "D"))
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "font.family": "sans-serif",
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, label: str) -> str:
    """The figure as an <svg> that scales with the page, described by `label` for those who do not see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def eps_errors(comparison: Comparison) -> str:
    """Relative error of eps over the steps, one line for each quantized method."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 3.4)
        for trace, (colour, line, marker) in zip(comparison.traces[1:], STYLES[1:], strict=False):
            error = comparison.eps_error(trace)
            axis.plot(error, color=colour, linestyle=line, marker=marker, markevery=max(1, len(error) // 8), label=trace.name)
        axis.set_yscale("log")
        axis.set_xlabel("DDIM step (noise to image)")
        axis.set_ylabel("error of eps, relative to FP32")
        axis.legend()
        return _svg(figure, "Relative error of the predicted noise over the denoising steps")


def range_map(scales: Scales, of: str) -> str:
    """Heat map of the largest activation, or residual, per layer (rows) and step (columns), on one logarithmic scale."""
    import matplotlib
    from matplotlib.colors import LogNorm

    both = [data[data > 0] for data in (scales.activation_range, scales.residual_range)]
    norm = LogNorm(min(float(v.min()) for v in both), max(float(v.max()) for v in both))
    data = (scales.activation_range if of == "activation" else scales.residual_range).T
    steps = [scales.rows.timesteps[int(s)] for s in scales.range_steps]
    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 4.4)
        shown = axis.imshow(np.where(data > 0, data, np.nan), aspect="auto", norm=norm, cmap="cividis", interpolation="nearest")
        ticks = range(0, len(steps), max(1, len(steps) // 6))
        axis.set_xticks(list(ticks), [str(steps[i]) for i in ticks])
        axis.set_xlabel("timestep t (noise to image)")
        axis.set_ylabel("layer, in order of execution")
        figure.colorbar(shown, ax=axis, label=f"largest |{of}|")
        return _svg(figure, f"Heat map of the largest {of} of each layer at each step")


def mode_curve(curve: ModeCurve) -> str:
    """PSNR over time, a point for each mixture of modes; the one that the scales have is filled."""
    import matplotlib

    times = [point.microseconds for point in curve.points]
    decibels = [point.decibels for point in curve.points]
    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 3.4)
        colour, line, marker = STYLES[0]
        axis.plot(times, decibels, color=colour, linestyle=line, marker=marker, markerfacecolor="none")
        axis.plot(
            times[curve.chosen], decibels[curve.chosen], color=colour, marker=marker, linestyle="none", label="these scales"
        )
        axis.set_xlabel("microseconds an image and pass")
        axis.set_ylabel("PSNR to FP32, dB")
        axis.legend()
        return _svg(figure, "PSNR of mixtures of modes over the time of a pass")


def bars(values: dict[str, float], unit: str, label: str, best: str | None = None) -> str:
    """Horizontal bars with their figures; `best` is drawn filled, the others hatched, so that it shows without colour."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 0.7 + 0.38 * len(values))
        for i, (name, value) in enumerate(values.items()):
            filled = name == best
            axis.barh(i, value, 0.62, color=STYLES[2][0] if filled else "none", edgecolor=INK, hatch=None if filled else "///")
            shown = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
            axis.annotate(shown, (value, i), (5, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(values)), list(values))
        axis.invert_yaxis()
        axis.set_xlim(0, max(values.values()) * 1.2)
        axis.set_xlabel(unit)
        return _svg(figure, label)


def png(image: np.ndarray[Any, Any]) -> str:
    """uint8 [H, W, 3] or [H, W, 1] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def strip(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [N, H, W, C] side by side."""
    return np.concatenate(list(images), axis=1)
