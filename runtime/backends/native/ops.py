"""The UNet on the native kernels: operations are gathered until a convolution needs its integer input.

Values are lazy. A residual add, a concatenation, a time bias, a normalization, SiLU and upsampling are only noted; the
kernel that quantizes the next convolution's input computes them on the way. A sum that is needed again later is written
once, by the first kernel that reads it. Arrays are channels-last, [N, H*W, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.networks.unet import GROUPS, NORM_EPS
from modiff_trt.plugins.modulated_conv.reference import InputShape
from modiff_trt.runtime.backends.native.layers import NativeLayer

# Layers whose output leaves the network keep it in full: it is small, and the sampler's.
WIDE_LAYERS = ("conv_out",)


class Kernels(Protocol):
    """The two launches of a layer, on one kind of device: `real` is the type between layers, `integer` that of a layer's
    quantized input, and `pads_real` says whether layers in float want their input channels padded too."""

    real: torch.dtype
    integer: torch.dtype
    pads_real: bool

    def busy(self) -> AbstractContextManager[None]:
        """Entered for every pass."""
        ...

    def start(self, state: Tensor, unit: float) -> Tensor:
        """A state given in units (int16 [H*W, C]) as these kernels keep it."""
        ...

    def quantize(
        self,
        layer: NativeLayer,
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
        """Writes the layer's integer input to `out` and moves `state`; without `grid` writes the input itself. With `steps`
        float32 [N] each image's grid spans its largest magnitude, and `steps` receives the steps."""
        ...

    def product(self, layer: NativeLayer, q: Tensor, scale: Tensor, addend: Tensor, out: Tensor, steps: Tensor | None) -> None:
        """out [N, P*Q, K'] = addend (same shape, may be `out` itself; or a bias [K']) + steps[n] scale[k] (weight * q)."""
        ...

    def real_product(self, layer: NativeLayer, sources: Sequence[Tensor]) -> Tensor:
        """[N, P*Q, K'] of a layer that is not quantized, from the concatenation of `sources` [N, H*W, C_i]."""
        ...


class Stream:
    """A tensor [N, H*W, C], or the sum of two that nobody has needed so far."""

    def __init__(self, a: Tensor, b: Tensor | None = None) -> None:
        self.a, self.b = a, b

    def tensor(self) -> Tensor:
        if self.b is not None:
            self.a, self.b = self.a + self.b, None
        return self.a


@dataclass(frozen=True)
class Value:
    """What `unet` passes around: sources, and what is still to be done to them. `channels` counts both sources."""

    main: Stream
    channels: int
    height: int
    width: int
    skip: Stream | None = None
    time: Tensor | None = None
    norm: tuple[Tensor, Tensor, int, float] | None = None
    silu: bool = False


@dataclass(frozen=True)
class Buffers:
    """What lives across passes for N images: `state` int16 and `o_hat` by layer (two layers may share one accumulator),
    zeroed integer inputs of layers whose channels are padded, and the row vector of the current pass."""

    state: Mapping[str, Tensor]
    o_hat: Mapping[str, Tensor]
    padded: Mapping[str, Tensor]
    row: Tensor

    def first(self, images: int) -> Buffers:
        """The same buffers for some of the images."""
        state, o_hat, padded = ({k: t[:images] for k, t in part.items()} for part in (self.state, self.o_hat, self.padded))
        return Buffers(state, o_hat, padded, self.row)


def shared_accumulators(layers: Mapping[str, NativeLayer]) -> dict[str, str]:
    """Shortcut convolution -> the convolution whose output it is added to: they share one `o_hat`, and need no add."""
    pairs = {}
    for name, layer in layers.items():
        partner = name.removesuffix(".nin_shortcut") + ".conv2"
        if name.endswith(".nin_shortcut") and layer.mode == layers[partner].mode != "float":
            pairs[name] = partner
    return pairs


class NativeOps:
    """The operations of `unet` for one pass; `Ops` of `networks.unet` over lazy values."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Mapping[str, NativeLayer],
        norms: Mapping[str, Tensor],
        time_at: Mapping[str, int],
        buffers: Buffers,
        aside: torch.cuda.Stream | None,
    ) -> None:
        """On the stream `aside` shortcuts in float are computed while the convolutions of their block are."""
        self._kernels, self._layers, self._norms, self._time_at, self._buffers = kernels, layers, norms, time_at, buffers
        self._shared = shared_accumulators(layers)
        self._outputs: dict[str, Tensor] = {}
        self._aside = aside
        self._begun: dict[str, tuple[list[Tensor], Tensor]] = {}

    def conv(
        self,
        name: str,
        x: Value,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        split: int = 0,
        parts: tuple[str, ...] = (),
        upsampled: bool = False,
    ) -> Value:
        layer, row = self._layers[name], self._buffers.row
        channels, height, width = layer.spec.out_shape
        if layer.mode == "float":
            if self._aside is not None and name in self._begun:
                torch.cuda.current_stream().wait_stream(self._aside)
                return Value(Stream(self._begun.pop(name)[1]), channels, height, width)
            if kernel > 1 or x.norm is not None:
                sources = [self._input(x, layer, None)]
            else:
                sources = self._sources(x)
            return Value(Stream(self._kernels.real_product(layer, sources)), channels, height, width)
        steps = torch.empty(len(x.main.a), device=row.device) if layer.dynamic else None
        q = self._input(x, layer, row[layer.grid_at : layer.grid_at + 4], steps)
        self._begin_shortcut(name, x)
        scale = row[layer.scale_at : layer.scale_at + layer.out_channels]
        if layer.mode == "modiff":
            out = self._buffers.o_hat[name]
            self._kernels.product(layer, q, scale, out, out, steps)
        elif name in self._shared:
            # Between the two products is this layer's `quantize`: it waits for the first before it lets the second begin.
            out = self._outputs[self._shared[name]]
            self._kernels.product(layer, q, scale, out, out, steps)
        else:
            dtype = torch.float32 if name in WIDE_LAYERS else self._kernels.real
            out = torch.empty(len(q), height * width, layer.out_channels, dtype=dtype, device=q.device)
            self._kernels.product(layer, q, scale, layer.bias, out, steps)
        self._outputs[name] = out
        return Value(Stream(out), channels, height, width)

    def _sources(self, x: Value) -> list[Tensor]:
        streams = [x.main] + ([x.skip] if x.skip is not None else [])
        return [stream.tensor().to(self._kernels.real) for stream in streams]

    def _begin_shortcut(self, first: str, x: Value) -> None:
        """Of a block whose `first` convolution has the input `x`: on the other stream, if there is one."""
        layer = self._layers.get(first.removesuffix("conv1") + "nin_shortcut")
        if self._aside is None or not first.endswith(".conv1") or layer is None or layer.mode != "float":
            return
        sources = self._sources(x)
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            # With its sources: memory that this stream lets go could be used again before the other stream has read it.
            self._begun[layer.spec.name] = sources, self._kernels.real_product(layer, sources)

    def _input(self, x: Value, layer: NativeLayer, grid: Tensor | None, steps: Tensor | None = None) -> Tensor:
        """The layer's integer input (or its input in the network's type), and the layer's new state."""
        skip = x.skip.tensor() if x.skip is not None else None
        skip_channels = skip.shape[2] if skip is not None else 0
        shape = InputShape(x.channels - skip_channels, skip_channels, x.height, x.width, layer.spec.upsampled)
        a, b = x.main.a, x.main.b
        total = torch.empty_like(a) if b is not None else None
        if layer.spec.name in self._buffers.padded:
            out = self._buffers.padded[layer.spec.name]
        else:
            dtype = self._kernels.integer if grid is not None else self._kernels.real
            out = torch.empty(len(a), shape.out_pixels, shape.total, dtype=dtype, device=a.device)
        self._kernels.quantize(
            layer,
            shape,
            a,
            out,
            b=b,
            total=total,
            skip=skip,
            time=x.time,
            norm=x.norm,
            silu=x.silu,
            grid=grid,
            state=self._buffers.state.get(layer.spec.name),
            steps=steps,
        )
        if total is not None:
            x.main.a, x.main.b = total, None
        return out

    def norm(self, name: str, x: Value) -> Value:
        return replace(x, norm=(self._norms[f"{name}.weight"], self._norms[f"{name}.bias"], GROUPS, NORM_EPS))

    def norm_silu(self, name: str, x: Value) -> Value:
        return replace(self.norm(name, x), silu=True)

    def add(self, a: Value, b: Value) -> Value:
        first, second = a.main.tensor(), b.main.tensor()
        if first.data_ptr() == second.data_ptr():  # a shared accumulator holds the sum already
            return a
        return replace(a, main=Stream(first, second))

    def add_time(self, block: str, x: Value, channels: int) -> Value:
        at = self._time_at[block]
        return replace(x, time=self._buffers.row[at : at + channels])

    def concat(self, a: Value, b: Value) -> Value:
        return replace(a, skip=b.main, channels=a.channels + b.channels)

    def attention(self, qkv: Value, channels: int) -> Value:
        tensor = qkv.main.tensor().to(self._kernels.real)
        n, pixels, _ = tensor.shape
        q, k, v = tensor.view(n, pixels, 3, channels).permute(2, 0, 1, 3).unsqueeze(2).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5)
        return replace(qkv, main=Stream(out.transpose(1, 2).reshape(n, pixels, channels)), channels=channels)

    def upsample(self, x: Value) -> Value:
        """Left to the convolution that follows, where there is one: its input is quantized first, then repeated."""
        if any(layer.spec.upsampled for layer in self._layers.values()):
            return x
        tensor = x.main.tensor().view(-1, x.height, x.width, x.channels)
        repeated = tensor.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        return replace(x, main=Stream(repeated), height=2 * x.height, width=2 * x.width)

    def avg_pool(self, x: Value) -> Value:
        tensor = x.main.tensor()
        image = tensor.view(len(tensor), x.height, x.width, x.channels).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(image, 2).permute(0, 2, 3, 1).reshape(len(tensor), -1, x.channels)
        return replace(x, main=Stream(pooled), height=x.height // 2, width=x.width // 2)

    def block_done(self, name: str, x: Value, y: Value) -> Value:
        return y
