"""The fastest way to run every convolution shape: tuned once, kept on disk, memory between launches shared.

cuDNN's plans compete with our own kernel where batches are small.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path, cache_folder
from modiff_trt.core.progress import LINE_EVERY
from modiff_trt.networks.operations import LayerSpec
from modiff_trt.plugins.modulated_conv.geometry import CHANNELS, ConvTile, Geometry, tiles_to_time

if TYPE_CHECKING:
    from modiff_trt.plugins.modulated_conv.libraries.cudnn_conv import ConvSpec, Int8Conv

log = logging.getLogger(__name__)
# Above so many output pixels cuDNN has always won, and our kernel is not tried.
FEW_SITES = 8192
# What stands in the cache in place of a cuDNN plan, before the number of the tile among `tiles_to_time`.
OWN_KERNEL = b"conv_kernel "


class ConvTactics:
    """Runs integer convolutions. A shape seen for the first time is tuned (seconds), or read from the cache."""

    def __init__(self, overlap: bool) -> None:
        """`overlap` lets our kernel begin while the launch before it ends (compute capability 9.0 and later)."""
        from modiff_trt.plugins.modulated_conv.kernels.conv import Scratch

        self._overlap = overlap
        self._convs: dict[ConvSpec, Int8Conv | ConvTile] = {}
        self._workspaces = [torch.empty(0, dtype=torch.uint8)]
        self._scratch = Scratch("cuda")
        self._tuned, self._told = 0, 0.0

    def run(
        self,
        spec: LayerSpec,
        q: Tensor,
        weight: Tensor,
        scale: Tensor,
        addend: Tensor,
        out: Tensor,
        steps: Tensor | None = None,
    ) -> None:
        """out = addend + scale[k] (weight * q) on the current stream; q int8 [N, H*W, C], out [N, P*Q, K].

        `addend` is of out's shape (and may be out: see `Int8Conv.run`), or a bias float32 [K]. With `steps` float32 [N] image
        n's scale is steps[n] scale, which our own kernel computes. Only a shape's first call allocates.
        """
        from modiff_trt.plugins.modulated_conv.libraries.cudnn_conv import ConvSpec

        _, height, width = spec.in_shape
        residual = addend.ndim == 3
        key = ConvSpec(
            len(q),
            q.shape[2],
            height,
            width=width,
            out_channels=out.shape[2],
            kernel=spec.kernel,
            stride=spec.stride,
            padding=spec.padding,
            dtype=out.dtype,
            residual=residual,
        )
        if steps is None and key not in self._convs:
            self._convs[key] = self._find(key)
        conv = self._convs[key] if steps is None else None
        if conv is None or isinstance(conv, ConvTile):
            self._run_own(key, q, weight, scale=scale, addend=addend, out=out, steps=steps, tile=conv)
            return
        if conv.workspace_size > self._workspaces[-1].numel():
            # Graphs that were captured with a smaller workspace go on using it.
            self._workspaces.append(torch.empty(conv.workspace_size, dtype=torch.uint8, device=q.device))
        conv.run(q, weight, scale, addend, out, self._workspaces[-1])

    def _find(self, key: ConvSpec) -> Int8Conv | ConvTile:
        """The fastest plan, or tile of our own kernel."""
        import cudnn

        from modiff_trt.plugins.modulated_conv.libraries.cudnn_conv import PLAN_ERRORS, Int8Conv

        place = {
            "gpu": torch.cuda.get_device_name(),
            "cudnn": cudnn.backend_version(),
            "overlap": self._overlap,
            "spec": str(asdict(key)),
            "tiles": [asdict(tile) for tile in tiles_to_time(_geometry(key))],
        }
        name = hashlib.sha256(repr(place).encode()).hexdigest()[:24]
        try:
            path = cache_folder() / f"{name}.plan"
            digest, blob = (content := path.read_bytes())[:32], content[32:]
            if hashlib.sha256(blob).digest() == digest:
                if blob.startswith(OWN_KERNEL):
                    return tiles_to_time(_geometry(key))[int(blob.removeprefix(OWN_KERNEL))]
                return Int8Conv(key, blob=blob)
        except torch.OutOfMemoryError:
            raise
        except (*PLAN_ERRORS, OSError, ValueError, IndexError, InputError):
            pass  # not there, or of no use: tuned anew
        self._tell()
        conv = Int8Conv(key)
        times = self._own_times(key)
        own = min(times, default=float("inf")) < conv.plan.time_us
        best = times.index(min(times)) if own else 0
        blob = OWN_KERNEL + str(best).encode() if own else conv.serialize()
        # A cache that cannot be written costs the next start some seconds, and nothing else.
        with contextlib.suppress(InputError, RuntimeError), atomic_path(cache_folder() / f"{name}.plan") as temporary:
            temporary.write_bytes(hashlib.sha256(blob).digest() + blob)
        return tiles_to_time(_geometry(key))[best] if own else conv

    def _tell(self) -> None:
        """Says now and then that shapes are being timed: how many there will be is not known here."""
        if self._tuned == 0:
            log.info("timing convolutions on this GPU, once for each shape and batch size: half a minute, or minutes")
            self._told = time.monotonic()
        elif time.monotonic() - self._told >= LINE_EVERY:
            log.info("timed %d shapes so far", self._tuned)
            self._told = time.monotonic()
        self._tuned += 1

    def _own_times(self, key: ConvSpec) -> list[float]:
        """Microseconds a run of our kernel by tile; empty where it is not tried."""
        from modiff_trt.plugins.modulated_conv.libraries.cudnn_conv import scratch_tensors
        from modiff_trt.plugins.modulated_conv.libraries.timing import graph_time_us

        n, _, p, q = key.out_shape
        if n * p * q > FEW_SITES or key.in_channels % CHANNELS:
            return []
        x, weight, scale, addend, out = scratch_tensors(key)
        flat = x.permute(0, 2, 3, 1).flatten(1, 2), weight, scale.flatten()
        rest = addend.permute(0, 2, 3, 1).flatten(1, 2) if key.residual else addend.flatten()
        result = out.permute(0, 2, 3, 1).flatten(1, 2)

        times = []
        for tile in tiles_to_time(_geometry(key)):

            def run(tile: ConvTile = tile) -> None:
                self._run_own(key, *flat, addend=rest, out=result, tile=tile)

            run()
            times.append(graph_time_us([run] * 10, 7))
        return times

    def _run_own(
        self,
        key: ConvSpec,
        q: Tensor,
        weight: Tensor,
        scale: Tensor,
        *,
        addend: Tensor,
        out: Tensor,
        tile: ConvTile | None,
        steps: Tensor | None = None,
    ) -> None:
        """Our kernel on tensors as `run` takes them; `weight` is channels_last, which is the order that it reads."""
        from modiff_trt.plugins.modulated_conv.kernels.conv import convolve_int8

        convolve_int8(
            q,
            weight.permute(0, 2, 3, 1),
            scale,
            addend=addend,
            out=out,
            size=(key.height, key.width),
            stride=key.stride,
            padding=key.padding,
            scratch=self._scratch,
            steps=steps,
            overlap=self._overlap,
            tile=tile,
        )


def _geometry(key: ConvSpec) -> Geometry:
    return Geometry(key.batch, key.in_channels, key.height, key.width, key.out_channels, key.kernel, key.stride, key.padding)
