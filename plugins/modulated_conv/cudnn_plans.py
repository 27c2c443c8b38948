"""The fastest cuDNN plan of every convolution shape: tuned once, kept on disk, one workspace for all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import atomic_path
from modiff_trt.export.unet import LayerSpec

if TYPE_CHECKING:
    from modiff_trt.plugins.modulated_conv.cudnn_conv import ConvSpec, Int8Conv

CACHE_VARIABLE = "MODIFF_TRT_CACHE"


def cache_folder() -> Path:
    """Where tuned plans are kept: $MODIFF_TRT_CACHE, or ~/.cache/modiff-trt."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "modiff-trt"


class ConvPlans:
    """Runs integer convolutions. A shape seen for the first time is tuned (seconds), or read from the cache."""

    def __init__(self) -> None:
        self._convs: dict[ConvSpec, Int8Conv] = {}
        self._workspaces = [torch.empty(0, dtype=torch.uint8)]

    def run(self, spec: LayerSpec, q: Tensor, weight: Tensor, scale: Tensor, addend: Tensor, out: Tensor) -> None:
        """out = addend + scale[k] (weight * q) on the current stream; q int8 [N, H*W, C], out [N, P*Q, K].

        `addend` is of out's shape (and may be out), or a bias float32 [K]. Only a shape's first call allocates.
        """
        from modiff_trt.plugins.modulated_conv.cudnn_conv import ConvSpec

        _, height, width = spec.in_shape
        residual = addend.ndim == 3
        key = ConvSpec(
            len(q), q.shape[2], height, width, out.shape[2], spec.kernel, spec.stride, spec.padding, out.dtype, residual
        )
        if key not in self._convs:
            self._convs[key] = self._find(key)
            if self._convs[key].workspace_size > self._workspaces[-1].numel():
                # Graphs that were captured with a smaller workspace go on using it.
                self._workspaces.append(torch.empty(self._convs[key].workspace_size, dtype=torch.uint8, device=q.device))
        self._convs[key].run(q, weight, scale, addend, out, self._workspaces[-1])

    def _find(self, key: ConvSpec) -> Int8Conv:
        import cudnn

        from modiff_trt.plugins.modulated_conv.cudnn_conv import PLAN_ERRORS, Int8Conv

        place = {"gpu": torch.cuda.get_device_name(), "cudnn": cudnn.backend_version(), "spec": str(asdict(key))}
        name = hashlib.sha256(repr(place).encode()).hexdigest()[:24]
        try:
            path = cache_folder() / f"{name}.plan"
            digest, blob = (content := path.read_bytes())[:32], content[32:]
            if hashlib.sha256(blob).digest() == digest:
                return Int8Conv(key, blob=blob)
        except torch.OutOfMemoryError:
            raise
        except (*PLAN_ERRORS, OSError, ValueError):
            pass  # not there, or of no use: tuned anew
        conv = Int8Conv(key)
        blob = conv.serialize()
        # A cache that cannot be written costs the next start some seconds, and nothing else.
        with contextlib.suppress(InputError, RuntimeError), atomic_path(cache_folder() / f"{name}.plan") as temporary:
            temporary.write_bytes(hashlib.sha256(blob).digest() + blob)
        return conv
