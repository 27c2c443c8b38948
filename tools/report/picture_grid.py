"""One picture of several rows of images, labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.files import atomic_path
from modiff_trt.runtime.images.folders import to_uint8


def save_grid(path: Path, rows: list[np.ndarray[Any, Any]], labels: list[str], title: str) -> None:
    """Writes a PNG whose row i shows the samples float32 [N, C, H, W] of `rows[i]`, named by `labels[i]`."""
    from matplotlib.figure import Figure

    strips = [
        np.concatenate(list(np.pad(to_uint8(r), ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)), axis=1) for r in rows
    ]
    count = len(rows[0])
    figure = Figure(figsize=(2.0 + 1.1 * count, 0.5 + 1.15 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    figure.suptitle(title, fontsize=11)
    for axis, strip, label in zip(axes, strips, labels, strict=True):
        axis.imshow(strip.squeeze(), interpolation="nearest", cmap="gray")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")
