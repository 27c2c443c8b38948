"""INT8 convolution on CPUs through oneDNN's operators in PyTorch: float32 output, added to a bias, or into `o_hat` in place.

oneDNN takes unsigned inputs: integers are stored as q + 128 with zero point 128. Without an INT8 dot product (VNNI) it adds
pairs of 8-bit products in 16 bits, where they saturate. There the input is split into two halves of at most 128, whose pairs
fit (2 * 128 * 127 < 2^15), so that sums are exact on every CPU, at the price of a second product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.networks.operations import LayerSpec

ZERO_POINT = 128


class OneDnnConv:
    """One layer's convolution with its packed weight int8 [K, C, R, R]."""

    def __init__(self, spec: LayerSpec, weight: Tensor, halves: bool | None = None) -> None:
        """`halves` splits the input; None does where this CPU needs it."""
        self._spec = spec
        top, left, bottom, right = spec.padding
        self._symmetric = (top, left) == (bottom, right)
        self._window = ([spec.stride] * 2, [top, left] if self._symmetric else [0, 0], [1, 1], 1)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self._ones = torch.ones(len(weight))
        self._halves = pairs_saturate() if halves is None else halves
        self._zero_point = ZERO_POINT // 2 if self._halves else ZERO_POINT
        prepack = torch.ops.onednn.qconv_prepack
        self._packed = prepack(weight.contiguous(), self._ones, 1.0, self._zero_point, *self._window, None)

    def __call__(self, q: Tensor, step: float, weight_scale: Tensor, addend: Tensor) -> Tensor:
        """float32 [N, P*Q, K]: addend + step * weight_scale[k] * (weight * (q - 128)), for q uint8 [N, H*W, C]. A sum
        [N, P*Q, K] is added to in place; a bias [K] gives a new tensor."""
        _, height, width = self._spec.in_shape
        image = q.view(len(q), height, width, -1).permute(0, 3, 1, 2)
        if not self._symmetric:
            top, left, bottom, right = self._spec.padding
            image = F.pad(image, (left, right, top, bottom), value=ZERO_POINT).contiguous(memory_format=torch.channels_last)
        low = image >> 1 if self._halves else None
        for part in (image,) if low is None else (low, image - low):
            addend = self._added(part, step, weight_scale, addend)
        return addend

    def _added(self, image: Tensor, step: float, weight_scale: Tensor, addend: Tensor) -> Tensor:
        given = (image, step, self._zero_point, self._packed, weight_scale, self._zero_points)
        if addend.ndim == 1:
            y: Tensor = torch.ops.onednn.qconv2d_pointwise(*given, addend, *self._window, 1.0, 0, torch.float32, "none", [], "")
            return y.permute(0, 2, 3, 1).reshape(len(image), -1, len(addend))
        target = addend.view(len(image), *self._spec.out_shape[1:], -1).permute(0, 3, 1, 2)
        torch.ops.onednn.qconv2d_pointwise.binary(
            *given, target, None, *self._window, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
        )
        return addend


@cache
def pairs_saturate() -> bool:
    """Whether oneDNN's sums of the largest 8-bit products saturate on this CPU."""
    return not sums_are_exact(halves=False)


def sums_are_exact(halves: bool) -> bool:
    """Whether the largest 8-bit products add up without saturating."""
    spec = LayerSpec("probe", ("probe",), (64, 4, 4), out_shape=(16, 4, 4), kernel=1, stride=1, padding=(0, 0, 0, 0))
    weight = torch.full((16, 64, 1, 1), 127, dtype=torch.int8)
    q = torch.full((1, 16, 64), 127 + ZERO_POINT, dtype=torch.uint8)
    out = OneDnnConv(spec, weight, halves)(q, 1.0, torch.ones(16), torch.zeros(16))
    return bool((out == 127 * 127 * 64).all())
