"""The fastest cuDNN plan of every convolution shape: tuned once, kept on disk, one workspace for all."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modiff_trt.export.files import atomic_path
from modiff_trt.export.unet import LayerSpec

if TYPE_CHECKING:
    from modiff_trt.plugins.modulated_conv.cudnn_conv import ConvSpec, Int8Conv

CACHE_VARIABLE = "MODIFF_TRT_CACHE"


def cache_folder() -> Path:
    """Where tuned plans are kept: $MODIFF_TRT_CACHE, or ~/.cache/modiff-trt."""
    return Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "modiff-trt"))


class ConvPlans:
    """Runs integer convolutions. A shape seen for the first time is tuned (seconds), or read from the cache."""

    def __init__(self) -> None:
        self._convs: dict[ConvSpec, Int8Conv] = {}
        self._workspace = torch.empty(0, dtype=torch.uint8)

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
            if self._convs[key].workspace_size > self._workspace.numel():
                # A graph that was captured with the old workspace keeps it alive through its own pool.
                self._workspace = torch.empty(self._convs[key].workspace_size, dtype=torch.uint8, device=q.device)
        self._convs[key].run(q, weight, scale, addend, out, self._workspace)

    def _find(self, key: ConvSpec) -> Int8Conv:
        import cudnn

        from modiff_trt.plugins.modulated_conv.cudnn_conv import PLAN_ERRORS, Int8Conv

        place = {"gpu": torch.cuda.get_device_name(), "cudnn": cudnn.backend_version(), "spec": str(asdict(key))}
        name = hashlib.sha256(repr(place).encode()).hexdigest()[:24]
        path = cache_folder() / f"{name}.plan"
        if path.exists():
            try:
                return Int8Conv(key, blob=path.read_bytes())
            except (*PLAN_ERRORS, ValueError):
                path.unlink(missing_ok=True)
        conv = Int8Conv(key)
        with atomic_path(path) as temporary:
            temporary.write_bytes(conv.serialize())
        return conv
