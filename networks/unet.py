"""The DDPM/DDIM UNet (arXiv 2006.11239, 2010.02502), written once, as a pure function over a set of operations.

`unet(ops, config, x)` is the only definition of the network. What it computes is decided by `ops`: torch tensors
(`torch_ops`), ONNX nodes (`onnx_ops`), or shapes only (`ShapeOps` here, which is how layers and parameters are
listed). Layer names are the module names of the reference checkpoints, except `qkv`: q, k and v of an attention
block read the same input, so they are one layer with one MoDiff state.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from modiff_trt.core.config import Config

GROUPS = 32
NORM_EPS = 1e-6

V = TypeVar("V")


@dataclass(frozen=True)
class LayerSpec:
    """A convolution that can be quantized and modulated.

    `params` are the checkpoint prefixes whose weights are stacked along the output channels (three for `qkv`).
    `padding` is (top, left, bottom, right), `split` the channel at which a concatenated skip begins (0: none). `upsampled` says
    that each 2x2 block of the input repeats one value (nearest upsampling), so that one value of a_hat stands for four.
    """

    name: str
    params: tuple[str, ...]
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    kernel: int
    stride: int
    padding: tuple[int, int, int, int]
    split: int = 0
    upsampled: bool = False

    @property
    def intensity(self) -> float:
        """Multiply-accumulates for each element of input and output: what tells arithmetic from moving data."""
        return self.macs / (prod(self.in_shape) + prod(self.out_shape))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        channels, height, width = self.out_shape
        return channels * height * width * self.in_shape[0] * self.kernel**2


class Ops(Protocol[V]):
    """What the network is made of. `V` is a tensor, or whatever stands for one."""

    def conv(
        self,
        name: str,
        x: V,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        split: int = 0,
        parts: tuple[str, ...] = (),
        upsampled: bool = False,
    ) -> V: ...
    def norm(self, name: str, x: V) -> V: ...
    def norm_silu(self, name: str, x: V) -> V: ...
    def add(self, a: V, b: V) -> V: ...
    def add_time(self, block: str, x: V, channels: int) -> V: ...
    def concat(self, a: V, b: V) -> V: ...
    def attention(self, qkv: V, channels: int) -> V: ...
    def upsample(self, x: V) -> V: ...
    def avg_pool(self, x: V) -> V: ...
    def block_done(self, name: str, x: V, y: V) -> V:
        """Called at the end of every residual and attention block with its input and output; returns the output."""
        ...


def resnet_block(ops: Ops[V], name: str, x: V, in_channels: int, out_channels: int, split: int) -> V:
    h = ops.norm_silu(f"{name}.norm1", x)
    h = ops.conv(f"{name}.conv1", h, out_channels, 3, split=split)
    h = ops.add_time(name, h, out_channels)
    h = ops.norm_silu(f"{name}.norm2", h)
    h = ops.conv(f"{name}.conv2", h, out_channels, 3)
    if in_channels != out_channels:
        return ops.block_done(name, x, ops.add(ops.conv(f"{name}.nin_shortcut", x, out_channels, 1, split=split), h))
    return ops.block_done(name, x, ops.add(x, h))


def attention_block(ops: Ops[V], name: str, x: V, channels: int) -> V:
    h = ops.norm(f"{name}.norm", x)
    qkv = ops.conv(f"{name}.qkv", h, 3 * channels, 1, parts=(f"{name}.q", f"{name}.k", f"{name}.v"))
    h = ops.attention(qkv, channels)
    h = ops.conv(f"{name}.proj_out", h, channels, 1)
    return ops.block_done(name, x, ops.add(x, h))


def unet(ops: Ops[V], config: Config, x: V) -> V:
    """Predicts epsilon, shape of `x` [N, C, H, W]. The timestep is bound into `ops` (see `Ops.add_time`)."""
    model = config.model
    resolution = config.data.image_size
    channels = model.ch
    h = ops.conv("conv_in", x, channels, 3)
    skips = [(h, channels)]
    last = len(model.ch_mult) - 1

    for level, mult in enumerate(model.ch_mult):
        for i in range(model.num_res_blocks):
            h = resnet_block(ops, f"down.{level}.block.{i}", h, channels, model.ch * mult, 0)
            channels = model.ch * mult
            if resolution in model.attn_resolutions:
                h = attention_block(ops, f"down.{level}.attn.{i}", h, channels)
            skips.append((h, channels))
        if level != last:
            if model.resamp_with_conv:
                h = ops.conv(f"down.{level}.downsample.conv", h, channels, 3, stride=2)
            else:
                h = ops.avg_pool(h)
            resolution //= 2
            skips.append((h, channels))

    h = resnet_block(ops, "mid.block_1", h, channels, channels, 0)
    h = attention_block(ops, "mid.attn_1", h, channels)
    h = resnet_block(ops, "mid.block_2", h, channels, channels, 0)

    for level in range(last, -1, -1):
        out_channels = model.ch * model.ch_mult[level]
        for i in range(model.num_res_blocks + 1):
            skip, skip_channels = skips.pop()
            h = ops.concat(h, skip)
            h = resnet_block(ops, f"up.{level}.block.{i}", h, channels + skip_channels, out_channels, channels)
            channels = out_channels
            if resolution in model.attn_resolutions:
                h = attention_block(ops, f"up.{level}.attn.{i}", h, channels)
        if level != 0:
            h = ops.upsample(h)
            resolution *= 2
            if model.resamp_with_conv:
                h = ops.conv(f"up.{level}.upsample.conv", h, channels, 3, upsampled=True)

    h = ops.norm_silu("norm_out", h)
    return ops.conv("conv_out", h, model.out_ch, 3)


Shape = tuple[int, int, int]


class ShapeOps:
    """Runs the network on (C, H, W) alone and records its layers, its parameters and its time projections."""

    def __init__(self, ch: int) -> None:
        temb = 4 * ch
        self.layers: list[LayerSpec] = []
        self.time_channels: dict[str, int] = {}
        self.blocks: list[str] = []
        self.parameters: dict[str, tuple[int, ...]] = {
            "temb.dense.0.weight": (temb, ch),
            "temb.dense.0.bias": (temb,),
            "temb.dense.1.weight": (temb, temb),
            "temb.dense.1.bias": (temb,),
        }
        self._temb = temb

    def conv(
        self,
        name: str,
        x: Shape,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        split: int = 0,
        parts: tuple[str, ...] = (),
        upsampled: bool = False,
    ) -> Shape:
        channels, height, width = x
        pad = kernel // 2
        # DDIM pads a strided convolution only at the bottom and the right.
        padding = (pad, pad, pad, pad) if stride == 1 else (0, 0, 1, 1)
        out = (out_channels, height // stride, width // stride)
        parts = parts or (name,)
        self.layers.append(LayerSpec(name, parts, x, out, kernel, stride, padding, split, upsampled))
        for part in parts:
            self.parameters[f"{part}.weight"] = (out_channels // len(parts), channels, kernel, kernel)
            self.parameters[f"{part}.bias"] = (out_channels // len(parts),)
        return out

    def norm(self, name: str, x: Shape) -> Shape:
        self.parameters[f"{name}.weight"] = self.parameters[f"{name}.bias"] = (x[0],)
        return x

    norm_silu = norm

    def add(self, a: Shape, b: Shape) -> Shape:
        assert a == b
        return a

    def add_time(self, block: str, x: Shape, channels: int) -> Shape:
        self.time_channels[block] = channels
        self.parameters[f"{block}.temb_proj.weight"] = (channels, self._temb)
        self.parameters[f"{block}.temb_proj.bias"] = (channels,)
        return x

    def concat(self, a: Shape, b: Shape) -> Shape:
        return (a[0] + b[0], *a[1:])

    def attention(self, qkv: Shape, channels: int) -> Shape:
        return (channels, *qkv[1:])

    def upsample(self, x: Shape) -> Shape:
        return (x[0], 2 * x[1], 2 * x[2])

    def avg_pool(self, x: Shape) -> Shape:
        return (x[0], x[1] // 2, x[2] // 2)

    def block_done(self, name: str, x: Shape, y: Shape) -> Shape:
        self.blocks.append(name)
        return y


@dataclass(frozen=True)
class Network:
    """What a configuration implies: layers in execution order, parameter shapes, time projections per block."""

    config: Config
    layers: tuple[LayerSpec, ...]
    parameters: dict[str, tuple[int, ...]]
    time_channels: dict[str, int]
    blocks: tuple[str, ...]

    def layer(self, name: str) -> LayerSpec:
        return self.by_name[name]

    @property
    def by_name(self) -> dict[str, LayerSpec]:
        return {spec.name: spec for spec in self.layers}

    @property
    def parameter_count(self) -> int:
        total = 0
        for shape in self.parameters.values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total


def trace(config: Config) -> Network:
    """Lists the network of a configuration, without allocating any of it."""
    ops = ShapeOps(config.model.ch)
    unet(ops, config, config.input_shape)
    return Network(config, tuple(ops.layers), ops.parameters, ops.time_channels, tuple(ops.blocks))
