"""INT8 convolution on CPUs through oneDNN's operators in PyTorch: float32 output, added into `o_hat` in place.

oneDNN takes unsigned inputs: integers are stored as q + 128 with zero point 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.export.unet import LayerSpec

ZERO_POINT = 128


class OneDnnConv:
    """One layer's convolution with its packed weight int8 [K, C, R, R]."""

    def __init__(self, spec: LayerSpec, weight: Tensor) -> None:
        self._spec = spec
        top, left, bottom, right = spec.padding
        self._symmetric = (top, left) == (bottom, right)
        self._window = ([spec.stride] * 2, [top, left] if self._symmetric else [0, 0], [1, 1], 1)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self._ones = torch.ones(len(weight))
        self._packed = torch.ops.onednn.qconv_prepack(weight.contiguous(), self._ones, 1.0, ZERO_POINT, *self._window, None)

    def add(self, q: Tensor, step: float, weight_scale: Tensor, out: Tensor) -> None:
        """out [N, P*Q, K] += step * weight_scale[k] * (weight * (q - 128)), in place; q uint8 [N, H*W, C]."""
        spec = self._spec
        _, height, width = spec.in_shape
        image = q.view(len(q), height, width, -1).permute(0, 3, 1, 2)
        if not self._symmetric:
            top, left, bottom, right = spec.padding
            image = F.pad(image, (left, right, top, bottom), value=ZERO_POINT).contiguous(memory_format=torch.channels_last)
        target = out.view(len(q), spec.out_shape[1], spec.out_shape[2], -1).permute(0, 3, 1, 2)
        torch.ops.onednn.qconv2d_pointwise.binary(
            image, step, ZERO_POINT, self._packed, weight_scale, self._zero_points, target, None, *self._window,
            1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "",
        )  # fmt: skip
