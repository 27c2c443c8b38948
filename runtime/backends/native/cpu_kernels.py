"""The native kernels on CPUs: vectorized float operations for a layer's input, oneDNN for its integer product.

`a_hat` is float32 here: a CPU has no use for the two bytes that int16 saves, and float32 resolves every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.grid import SMALLEST_SCALE, grid_ends
from modiff_trt.core.moving_grids import shifts_of_phase
from modiff_trt.networks.operations import LayerSpec
from modiff_trt.networks.torch_ops import convolve
from modiff_trt.plugins.modulated_conv.libraries.onednn_conv import ZERO_POINT, OneDnnConv, pairs_saturate, sums_are_exact
from modiff_trt.plugins.modulated_conv.reference import InputShape
from modiff_trt.runtime.backends.cores import FreeCores
from modiff_trt.runtime.backends.native.layers import NativeLayer

# Libraries divide long sums among threads, and how many there are then shows in the last bits (docs/lab/kernels.md). Sums of so
# many terms they do not divide.
TERMS = 256
# Pixels from which on they divide an image's group norm, and not a single image's convolution.
LARGE = 1024
# Channels that a pass's shifts are made for at once.
MOST_CHANNELS = 4096


class CpuKernels:
    """`Kernels` on the CPU, with as many threads as torch has."""

    real = torch.float32
    integer = torch.uint8
    offset = ZERO_POINT

    def __init__(self) -> None:
        if not hasattr(torch.ops.onednn, "qconv2d_pointwise") or not torch.backends.mkldnn.is_available():
            raise InputError("this torch has no oneDNN, which --backend native needs on a CPU; use --backend onnx")
        if not sums_are_exact(halves=pairs_saturate()):
            raise InputError("oneDNN's sums of 8-bit products are not exact on this CPU; use --backend onnx")
        self._free = FreeCores(torch.get_num_threads())
        self._convs: dict[tuple[str, int], OneDnnConv] = {}
        self._phase, self._shifts_now = -1, torch.empty(0)

    def busy(self) -> AbstractContextManager[None]:
        """As many threads as there are cores that other processes leave free: images do not depend on the number."""
        return _threads(self._free.update())

    def start(self, state: Tensor, unit: float) -> Tensor:
        return state.float() * unit

    def quantize(
        self,
        layer: NativeLayer | None,
        shape: InputShape,
        a: Tensor,
        out: Tensor,
        *,
        b: Tensor | None,
        total: Tensor | None,
        skip: Tensor | None,
        time: Tensor | None,
        norm: tuple[Tensor, Tensor, int, float] | None,
        silu: bool,
        grid: Tensor | None,
        state: Tensor | None,
        steps: Tensor | None,
    ) -> None:
        if b is not None:
            a = torch.add(a, b, out=total) if total is not None else a + b
        x = a if skip is None else torch.cat([a, skip], dim=2)
        if time is not None:
            x = x + time
        fresh = x is not a
        if norm is not None:
            gain, shift, groups, eps = norm
            x, fresh = _group_norm(x, shape, groups, gain=gain, bias=shift, eps=eps), True
        if silu:
            x, fresh = F.silu(x, inplace=fresh), True
        if layer is not None and layer.factors is not None:
            x, fresh = x * layer.factors, True
        if grid is None or layer is None:
            out.copy_(_pixels(F.interpolate(_image(x, shape), scale_factor=2.0, mode="nearest")) if shape.upsample else x)
            return
        low, high = grid_ends(layer.bits, layer.zero_point)
        if state is not None:
            x, fresh = torch.sub(x, state, out=x if fresh else None), True
        if steps is not None:
            torch.div(x.abs().amax((1, 2)), high, out=steps).clamp_min_(SMALLEST_SCALE)
            cells = torch.div(x, steps[:, None, None], out=x if fresh else None).round_().clamp_(low, high)
            if state is not None:
                state.addcmul_(cells, steps[:, None, None])
        else:
            inverse_step, _, _, step, phase = grid.tolist()
            cells = torch.mul(x, inverse_step, out=x if fresh else None)
            if layer.moving:
                cells.add_(self._shifts(int(phase), cells.shape[2]))
            cells.round_().clamp_(low, high)
            if state is not None:
                state.add_(cells, alpha=step)
        if layer.zero_point:
            cells.add_(layer.zero_point)
        if shape.upsample:
            cells = _pixels(F.interpolate(_image(cells, shape), scale_factor=2.0, mode="nearest"))
        if any(shape.frame):
            (height, width), (top, left, _, _) = shape.out_size, shape.frame
            rows = out.view(len(out), -1, shape.pitch, out.shape[2])
            out, cells = rows[:, top : top + height, left : left + width], cells.view(len(out), height, width, -1)
        out = out[..., : shape.total]
        # torch is seven times as fast from float32 to int8 as to uint8; the upper bit adds ZERO_POINT.
        out.view(torch.int8).copy_(cells)
        out.bitwise_xor_(ZERO_POINT)

    def _shifts(self, phase: int, channels: int) -> Tensor:
        """float32 [channels] of the pass with this phase, which is the same in all layers."""
        if phase != self._phase or len(self._shifts_now) < channels:
            self._phase, self._shifts_now = phase, torch.from_numpy(shifts_of_phase(phase, max(channels, MOST_CHANNELS)))
        return self._shifts_now[:channels]

    def quantize_pixels(
        self,
        layer: NativeLayer | None,
        a: Tensor,
        out: Tensor,
        *,
        b: Tensor | None,
        total: Tensor | None,
        layer_norm: tuple[Tensor, Tensor, float] | None,
        grid: Tensor | None,
        state: Tensor | None,
    ) -> None:
        if layer_norm is not None:
            gain, shift, eps = layer_norm
            x = F.layer_norm(a if b is None else torch.add(a, b, out=total), gain.shape, gain, shift, eps)
        else:
            value, gate = a.chunk(2, dim=2)
            x = value * F.gelu(gate)
        shape = InputShape(x.shape[2], 0, x.shape[1], width=1)
        nothing = {"b": None, "total": None, "skip": None, "time": None, "norm": None, "steps": None}
        self.quantize(layer, shape, x, out, silu=False, grid=grid, state=state, **nothing)

    def product(self, layer: NativeLayer, q: Tensor, scale: Tensor, addend: Tensor, steps: Tensor | None) -> Tensor:
        key = (layer.spec.name, layer.weight.data_ptr())
        conv = self._convs.get(key)
        if conv is None:
            conv = self._convs[key] = OneDnnConv(layer.product_spec, layer.weight)
        if steps is None:
            return conv(q, 1.0, scale, addend)
        bias = addend.ndim == 1
        each = [conv(q[i : i + 1], step, scale, addend if bias else addend[i : i + 1]) for i, step in enumerate(steps.tolist())]
        return torch.cat(each) if bias else addend

    def real_channels(self, spec: LayerSpec) -> int:
        return spec.in_shape[0]

    def real_product(self, layer: NativeLayer, sources: Sequence[Tensor]) -> Tensor:
        return _spatial(layer, sources[0]) if layer.spec.kernel > 1 else _pointwise(layer, sources)


def _spatial(layer: NativeLayer, x: Tensor) -> Tensor:
    """The unquantized convolution of x [N, H*W, C] with a kernel larger than 1: [N, P*Q, K]."""
    channels, height, width = layer.spec.in_shape
    image = x.view(len(x), height, width, channels).permute(0, 3, 1, 2)
    # Threads take an image each, and only of a single small one they divide the sums.
    with _threads(1) if len(x) == 1 and height * width < LARGE else nullcontext():
        return _pixels(convolve(layer.spec, image, layer.weight, bias=layer.bias))


def _pointwise(layer: NativeLayer, sources: Sequence[Tensor]) -> Tensor:
    """The unquantized 1x1 convolution of the concatenation of `sources` [N, H*W, C_i]: [N, H*W, K], without copying them."""
    slices = [part for source in sources for part in source.split(TERMS, dim=2)]
    weights = layer.weight.flatten(1).split([part.shape[2] for part in slices], dim=1)
    out = F.linear(slices[0], weights[0], layer.bias)
    for part, weight in zip(slices[1:], weights[1:], strict=True):
        out.view(-1, out.shape[2]).addmm_(part.flatten(0, 1), weight.T)
    return out


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _group_norm(x: Tensor, shape: InputShape, groups: int, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of x [N, H*W, C]: the same bits for every number of threads, which torch's own are not for large images."""
    n, pixels, channels = x.shape
    if pixels < LARGE:
        return _pixels(F.group_norm(_image(x, shape), groups, gain, bias, eps))
    rows = _rows_at_once(shape)
    parts, length = shape.height // rows, rows * shape.width
    mean_of_part = torch.full((n * parts, 1, length), 1 / length)

    def mean(values: Tensor) -> Tensor:
        """Over the pixels and the channels of a group, for each channel: [N, 1, C]."""
        by_channel = torch.bmm(mean_of_part, values.view(n * parts, length, channels)).view(n, parts, groups, -1)
        by_group = by_channel.transpose(1, 2).reshape(n, groups, -1).mean(2, keepdim=True)
        return by_group.expand(-1, -1, channels // groups).reshape(n, 1, channels)

    centered = x - mean(x)
    return centered.mul_(torch.rsqrt(mean(centered * centered) + eps) * gain).add_(bias)


def _rows_at_once(shape: InputShape) -> int:
    """The most rows that divide an image and have at most TERMS pixels; one where a row has more."""
    fitting = (rows for rows in range(min(shape.height, TERMS // shape.width), 0, -1) if shape.height % rows == 0)
    return next(fitting, 1)


def _image(x: Tensor, shape: InputShape) -> Tensor:
    """[N, H*W, C] as [N, C, H, W] in channels_last memory."""
    return x.view(len(x), shape.height, shape.width, -1).permute(0, 3, 1, 2)


def _pixels(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(len(image), -1, image.shape[1])
