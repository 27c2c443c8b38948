"""The measuring job of calibration, under a progress bar."""

from __future__ import annotations

from collections.abc import Iterator

from modiff_trt.export.calibrate import LayerRanges, measure_ranges
from modiff_trt.export.checkpoint import Checkpoint
from modiff_trt.export.trajectories import Trajectories
from modiff_trt.export.unet import Network
from modiff_trt.tools.progress import progress_bar


def measure(
    network: Network, checkpoint: Checkpoint, trajectories: Trajectories, batch_size: int, device: str
) -> dict[str, LayerRanges]:
    """`measure_ranges` on a device."""
    params = {key: value.to(device) for key, value in checkpoint.params.items()}
    with progress_bar() as bar:

        def steps(items: Iterator[int], total: int) -> Iterator[int]:
            return iter(bar.track(items, total=total, description="calibrate"))

        return measure_ranges(network, params, trajectories, batch_size, steps)
