"""The network on the native kernels: operations are gathered until a convolution needs its integer input.

Values are lazy. A residual add, a concatenation, a time bias, a normalization, SiLU and upsampling are only noted, in the
order in which the kernel that quantizes the next convolution's input computes them. What does not fit that order is computed
first, by `NativeOps.written`, which every operation calls that needs a tensor. A sum that is needed again later is written
once, by the first kernel that reads it. Arrays are channels-last, [N, H*W, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.kinds import Mode
from modiff_trt.networks.operations import LAYER_NORM_EPS, Block, LayerSpec, Role
from modiff_trt.plugins.modulated_conv.reference import InputShape
from modiff_trt.runtime.backends.native.layers import GRID_NUMBERS, NativeLayer


class Kernels(Protocol):
    """The two launches of a layer, on one kind of device: `real` is the type between layers, `integer` that of a layer's
    quantized input, in which `offset` stands for 0."""

    real: torch.dtype
    integer: torch.dtype
    offset: int

    def busy(self) -> AbstractContextManager[None]:
        """Entered for every pass."""
        ...

    def start(self, state: Tensor, unit: float) -> Tensor:
        """A state given in units (int16 [H*W, C]) as these kernels keep it."""
        ...

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
        """Writes the layer's integer input to `out` and moves `state`; without `grid` writes the input itself, which without a
        `layer` has no factors. With `steps` float32 [N] each image's grid spans its largest magnitude, and `steps` receives the
        steps."""
        ...

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
        """`quantize` for an input that is a layer norm of a + b (which `total` receives), or without one GEGLU of a."""
        ...

    def product(self, layer: NativeLayer, q: Tensor, scale: Tensor, addend: Tensor, steps: Tensor | None) -> Tensor:
        """addend + steps[n] scale[k] (weight * q): a sum [N, P*Q, K'] is added to in place, a bias [K'] gives a new tensor."""
        ...

    def real_channels(self, spec: LayerSpec) -> int:
        """Input channels that a layer has if it is not quantized, those of padding counted in."""
        ...

    def real_product(self, layer: NativeLayer, sources: Sequence[Tensor]) -> Tensor:
        """[N, P*Q, K'] of a layer that is not quantized, from the concatenation of `sources` [N, H*W, C_i]."""
        ...


class Source:
    """A tensor [N, H*W, C], or the sum of two that nobody has needed so far."""

    def __init__(self, a: Tensor, b: Tensor | None = None) -> None:
        self.a, self.b = a, b

    def tensor(self) -> Tensor:
        if self.b is not None:
            self.a, self.b = self.a + self.b, None
        return self.a


@dataclass(frozen=True)
class LazyValue:
    """What the network passes around: sources of `height` x `width` pixels, and what is still to be done, in this order:
    `skip` concatenated, `time` [C] added, `norm` (gain [C], shift [C], groups, eps), SiLU, `repeated` to 2x2 pixels each. Or,
    in place of all these, a `layer_norm` (gain [C], shift [C], eps) over each pixel's channels, or GEGLU, of which `main` has
    twice the channels. `channels` counts both sources, and what GEGLU leaves. `accumulator` names the shared sum that `main`
    is, as it comes out of its layer."""

    main: Source
    channels: int
    height: int
    width: int
    skip: Source | None = None
    time: Tensor | None = None
    norm: tuple[Tensor, Tensor, int, float] | None = None
    silu: bool = False
    repeated: bool = False
    layer_norm: tuple[Tensor, Tensor, float] | None = None
    gated: bool = False
    accumulator: str | None = None

    @property
    def is_changed(self) -> bool:
        """Whether anything but a sum and a concatenation is to be done."""
        return self.time is not None or self.norm is not None or self.silu or self.repeated or self.is_of_pixels

    @property
    def is_of_pixels(self) -> bool:
        """Whether a layer norm or GEGLU is to be done, which nothing else may follow."""
        return self.layer_norm is not None or self.gated

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a sum is to be done."""
        return not self.is_changed and self.skip is None


@dataclass(frozen=True)
class Buffers:
    """What lives across passes for N images: `state` int16 and `o_hat` by layer (two layers may share one accumulator),
    `filled` integer inputs of layers whose channels or images are padded (which alike layers share), the row vector of the
    current pass, and what a context gives: keys and values by attention, [N, 2, S, C]."""

    state: Mapping[str, Tensor]
    o_hat: Mapping[str, Tensor]
    filled: Mapping[str, Tensor]
    row: Tensor
    bound: Mapping[str, Tensor] = field(default_factory=dict)

    def first(self, images: int) -> Buffers:
        """The same buffers for some of the images."""
        parts = (self.state, self.o_hat, self.filled, self.bound)
        state, o_hat, filled, bound = ({k: t[:images] for k, t in part.items()} for part in parts)
        return Buffers(state, o_hat, filled, row=self.row, bound=bound)


def shared_accumulators(layers: Mapping[str, NativeLayer]) -> dict[str, str]:
    """Shortcut -> the layer whose output it is added to: they share one `o_hat`, and need no add."""
    pairs = {}
    for name, layer in layers.items():
        partner = layer.spec.added_to
        if partner and layer.mode == layers[partner].mode != Mode.FLOAT:
            pairs[name] = partner
    return pairs


class NativeOps:
    """The operations of a network for one pass; `Ops` of `networks.operations` over lazy values."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Mapping[str, NativeLayer],
        norms: Mapping[str, Tensor],
        time_at: Mapping[str, int],
        buffers: Buffers,
        aside: torch.cuda.Stream | None,
        times: Mapping[str, Tensor],
    ) -> None:
        """On the stream `aside` shortcuts in float are computed while the convolutions of their block are. `times` [N, C] are
        what the timestep gives the blocks where that differs from image to image."""
        self._kernels, self._layers, self._norms, self._time_at, self._buffers = kernels, layers, norms, time_at, buffers
        self._shared = shared_accumulators(layers)
        self._partners = set(self._shared.values())
        self._shortcuts = {
            layer.spec.beside: layer for layer in layers.values() if layer.spec.beside and layer.mode == Mode.FLOAT
        }
        self._outputs: dict[str, Tensor] = {}
        self._aside, self._times = aside, times
        self._begun: dict[str, tuple[list[Tensor], Tensor]] = {}

    def layer(self, spec: LayerSpec, x: LazyValue) -> LazyValue:
        x = self._whole(x)
        name, layer, row = spec.name, self._layers[spec.name], self._buffers.row
        if x.repeated and not spec.upsampled:
            x = self._written_value(x)
        if spec.upsampled and not x.repeated:
            raise ValueError(f"layer '{name}' keeps one state for 2x2 pixels, and its input is not what `upsample` gave")
        channels, height, width = spec.out_shape
        if layer.mode == Mode.FLOAT:
            if name in self._begun:
                assert self._aside is not None
                torch.cuda.current_stream().wait_stream(self._aside)
                return LazyValue(Source(self._begun.pop(name)[1]), channels, height, width=width)
            fits = name not in self._buffers.filled and (spec.kernel == 1 or x.skip is None)
            sources = self._sources(x) if fits and not x.is_changed else [self._read(x, layer, None)]
            return LazyValue(Source(self._kernels.real_product(layer, sources)), channels, height, width=width)
        steps = torch.empty(len(x.main.a), device=row.device) if layer.dynamic else None
        q = self._read(x, layer, row[layer.grid_at : layer.grid_at + GRID_NUMBERS], steps=steps)
        self._begin_shortcut(name, x)
        scale = row[layer.scale_at : layer.scale_at + layer.out_channels]
        if layer.mode == Mode.MODIFF:
            addend = self._buffers.o_hat[name]
        elif name in self._shared:
            # Between the two products is this layer's `quantize`: it waits for the first before it lets the second begin.
            addend = self._outputs[self._shared[name]]
        else:
            addend = layer.bias if layer.bias_at is None else row[layer.bias_at : layer.bias_at + layer.out_channels]
        out = self._kernels.product(layer, q, scale, addend, steps)
        if name in self._partners:
            self._outputs[name] = out
        if layer.out_channels != channels and spec.role is not Role.OUTPUT:
            # What reads it next counts on the channels that there are.
            out = out[:, :, :channels].contiguous()
        shared = self._shared.get(name, name if name in self._partners else None)
        return LazyValue(Source(out), channels, height, width=width, accumulator=shared)

    def _sources(self, x: LazyValue) -> list[Tensor]:
        return [stream.tensor() for stream in (x.main, x.skip) if stream is not None]

    def _begin_shortcut(self, first: str, x: LazyValue) -> None:
        """Of a block whose `first` convolution has the input `x`, before its normalization: on the other stream, if there is
        one."""
        layer = self._shortcuts.get(first)
        if self._aside is None or layer is None:
            return
        sources = self._sources(x)
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            # With its sources: memory that this stream lets go could be used again before the other stream has read it.
            self._begun[layer.spec.name] = sources, self._kernels.real_product(layer, sources)

    def written(self, x: LazyValue) -> Tensor:
        """x [N, H*W, C] with all that was left to do, in the network's type."""
        if x.is_changed:
            return self._read(x, None, None)
        sources = self._sources(x)
        return (torch.cat(sources, dim=2) if len(sources) > 1 else sources[0]).to(self._kernels.real)

    def _written_value(self, x: LazyValue) -> LazyValue:
        factor = 2 if self._whole(x).repeated else 1
        return LazyValue(Source(self.written(x)), x.channels, factor * x.height, width=factor * x.width)

    def _read(self, x: LazyValue, layer: NativeLayer | None, grid: Tensor | None, steps: Tensor | None = None) -> Tensor:
        """The layer's integer input (without `grid` its input in the network's type), and the layer's new state."""
        if x.is_of_pixels and steps is not None:
            x = self._written_value(x)
        skip = x.skip.tensor() if x.skip is not None else None
        skip_channels = skip.shape[2] if skip is not None else 0
        frame = layer.frame if layer is not None else (0, 0, 0, 0)
        shape = InputShape(x.channels - skip_channels, skip_channels, x.height, x.width, upsample=x.repeated, frame=frame)
        a, b = x.main.a, x.main.b
        total = torch.empty_like(a) if b is not None else None
        state = None if layer is None else self._buffers.state.get(layer.spec.name)
        name = layer.spec.name if layer is not None else ""
        if name in self._buffers.filled:
            out = self._buffers.filled[name]
        else:
            dtype = self._kernels.integer if grid is not None else self._kernels.real
            out = torch.empty(len(a), shape.out_pixels, shape.total, dtype=dtype, device=a.device)
        if x.is_of_pixels:
            self._kernels.quantize_pixels(layer, a, out, b=b, total=total, layer_norm=x.layer_norm, grid=grid, state=state)
        else:
            self._kernels.quantize(
                layer,
                shape,
                a,
                out=out,
                b=b,
                total=total,
                skip=skip,
                time=x.time,
                norm=x.norm,
                silu=x.silu,
                grid=grid,
                state=state,
                steps=steps,
            )
        if total is not None:
            x.main.a, x.main.b = total, None
        return out

    @staticmethod
    def _whole(x: LazyValue) -> LazyValue:
        """x, unless it is a part of a shared sum: before the other part is added, nothing else may be done to it."""
        if x.accumulator is not None:
            raise ValueError(f"the output of layer '{x.accumulator}' is used before its shortcut has been added")
        return x

    def norm(self, name: str, x: LazyValue, groups: int, eps: float) -> LazyValue:
        return self._normed(x, self._norms[f"{name}.weight"], self._norms[f"{name}.bias"], groups=groups, eps=eps)

    def _normed(self, x: LazyValue, gain: Tensor, shift: Tensor, groups: int, eps: float) -> LazyValue:
        if self._whole(x).norm is not None or x.silu or x.repeated or x.is_of_pixels:
            x = self._written_value(x)
        return replace(x, norm=(gain, shift, groups, eps))

    def norm_silu(self, name: str, x: LazyValue, groups: int, eps: float) -> LazyValue:
        return replace(self.norm(name, x, groups, eps), silu=True)

    def timed_norm_silu(self, block: str, name: str, x: LazyValue, groups: int, eps: float) -> LazyValue:
        """Scale and shift by the timestep are another gain and shift of the normalization, which depend on the row alone."""
        if block in self._times:
            x = self._written_value(self.norm(name, x, groups, eps))
            of_image, more = self._times[block][:, None].to(self._kernels.real).chunk(2, dim=2)
            return replace(x, main=Source(F.silu(x.main.tensor() * (1 + of_image) + more)))
        gain, shift = self._norms[f"{name}.weight"], self._norms[f"{name}.bias"]
        at, row = self._time_at[block], self._buffers.row
        scale, more = row[at : at + x.channels] + 1, row[at + x.channels : at + 2 * x.channels]
        return replace(self._normed(x, gain * scale, shift * scale + more, groups=groups, eps=eps), silu=True)

    def add(self, a: LazyValue, b: LazyValue) -> LazyValue:
        if a.accumulator is not None and a.accumulator == b.accumulator:  # it holds the sum already
            return replace(a, accumulator=None)
        a, b = (x if self._whole(x).is_plain else self._written_value(x) for x in (a, b))
        return replace(a, main=Source(a.main.tensor(), b.main.tensor()))

    def add_time(self, block: str, x: LazyValue, channels: int) -> LazyValue:
        if self._whole(x).is_changed:
            x = self._written_value(x)
        if block in self._times:
            return replace(x, main=Source(x.main.tensor() + self._times[block][:, None].to(self._kernels.real)))
        at = self._time_at[block]
        return replace(x, time=self._buffers.row[at : at + channels])

    def concat(self, a: LazyValue, b: LazyValue) -> LazyValue:
        a, b = (x if self._whole(x).is_plain else self._written_value(x) for x in (a, b))
        return replace(a, skip=b.main, channels=a.channels + b.channels)

    def attention(self, qkv: LazyValue, channels: int, heads: int) -> LazyValue:
        qkv = self._written_value(qkv)
        tensor = qkv.main.tensor()
        n, pixels, _ = tensor.shape
        q, k, v = tensor.view(n, pixels, 3, heads, channels // heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=(channels // heads) ** -0.5)
        return replace(qkv, main=Source(out.transpose(1, 2).reshape(n, pixels, channels)), channels=channels)

    def layer_norm(self, name: str, x: LazyValue) -> LazyValue:
        if not self._whole(x).is_plain:
            x = self._written_value(x)
        return replace(x, layer_norm=(self._norms[f"{name}.weight"], self._norms[f"{name}.bias"], LAYER_NORM_EPS))

    def geglu(self, x: LazyValue) -> LazyValue:
        if not self._whole(x).is_plain or x.main.b is not None:
            x = self._written_value(x)
        return replace(x, gated=True, channels=x.channels // 2)

    def cross_attention(self, name: str, q: LazyValue, channels: int, heads: int) -> LazyValue:
        q = self._written_value(q)
        tensor, prompt = q.main.tensor(), self._buffers.bound[name]
        n, pixels, _ = tensor.shape
        k, v = prompt.view(n, 2, -1, heads, channels // heads).transpose(2, 3).unbind(1)
        out = F.scaled_dot_product_attention(tensor.view(n, pixels, heads, channels // heads).transpose(1, 2), k, v)
        return replace(q, main=Source(out.transpose(1, 2).reshape(n, pixels, channels)))

    def upsample(self, x: LazyValue) -> LazyValue:
        """Left to the convolution that follows: its input is quantized first, then repeated."""
        if self._whole(x).repeated or x.is_of_pixels:
            x = self._written_value(x)
        return replace(x, repeated=True)

    def avg_pool(self, x: LazyValue) -> LazyValue:
        x = self._written_value(x)
        tensor = x.main.tensor()
        image = tensor.view(len(tensor), x.height, x.width, x.channels).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(image, 2).permute(0, 2, 3, 1).reshape(len(tensor), -1, x.channels)
        return replace(x, main=Source(pooled), height=x.height // 2, width=x.width // 2)

    def block(self, name: str, body: Block, x: LazyValue) -> LazyValue:
        return body(self, x)
