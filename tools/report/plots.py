"""The report's plots: matplotlib's SVG, whose ink takes the page's colour so that it suits light and dark."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
from PIL import Image

from modiff_trt.core.costs import ModeCurve
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.tools.report.data import Comparison

# Stands for the page's own colour; nothing else has it.
INK = "#010203"
# What is compared with, and what the page is about, in the page's accent.
STYLES = (("#8b98a5", "--", "s"), ("#12968f", "-", "o"))
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
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 3.4)
        for trace, (colour, line, marker) in zip(comparison.traces[1:], STYLES, strict=False):
            error = comparison.eps_error(trace)
            axis.plot(error, color=colour, linestyle=line, marker=marker, markevery=max(1, len(error) // 8), label=trace.name)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step (noise to image)")
        axis.set_ylabel("error of eps, relative to FP32")
        axis.legend()
        return _svg(figure, "Relative error of the predicted noise over the denoising steps")


def drift(comparison: Comparison) -> str:
    """PSNR of x to FP32's x before each step and at the end, one line for each quantized method."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    exact = comparison.traces[0]
    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 3.4)
        for trace, (colour, line, marker) in zip(comparison.traces[1:], STYLES, strict=False):
            pairs = [*zip(trace.x[1:], exact.x[1:], strict=True), (trace.samples, exact.samples)]
            decibels = [psnr(x, y) for x, y in pairs]
            steps = range(1, len(decibels) + 1)
            every = max(1, len(decibels) // 8)
            axis.plot(steps, decibels, color=colour, linestyle=line, marker=marker, markevery=every, label=trace.name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("steps done")
        axis.set_ylabel("PSNR to FP32, dB")
        axis.legend()
        return _svg(figure, "PSNR of the images on their way over the steps")


def heat_map(data: np.ndarray[Any, Any], ends: tuple[float, float]) -> str:
    """[layers, steps] as a data URL of one pixel a value, on a logarithmic scale between `ends`; transparent where it is 0."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    shown = np.ma.masked_less_equal(data, 0)
    pixels = colormaps["cividis"](LogNorm(*ends)(shown), bytes=True)
    pixels[..., 3] = np.where(data > 0, 255, 0)
    return png(np.asarray(pixels))


def mode_curve(curve: ModeCurve) -> str:
    """PSNR over time, a point for each mixture of modes; the one that the scales have is filled."""
    import matplotlib

    times = [point.step_microseconds for point in curve.points]
    decibels = [point.decibels for point in curve.points]
    with matplotlib.rc_context(SETTINGS):
        figure, axis = _figure(5.4, 3.4)
        colour, line, marker = STYLES[1]
        axis.plot(times, decibels, color=colour, linestyle=line, marker=marker, markerfacecolor="none")
        axis.plot(
            times[curve.chosen], decibels[curve.chosen], color=colour, marker=marker, linestyle="none", label="these scales"
        )
        axis.set_xlabel("microseconds an image and step")
        axis.set_ylabel("PSNR to FP32, dB")
        axis.legend()
        return _svg(figure, "PSNR of mixtures of modes over the time of a step")


def png(image: np.ndarray[Any, Any]) -> str:
    """uint8 [H, W, C] of 1, 3 or 4 channels as a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def strip(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [N, H, W, C] side by side."""
    return np.concatenate(list(images), axis=1)
