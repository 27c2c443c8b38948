"""The DDPM/DDIM UNet (arXiv 2006.11239, 2010.02502), written once, as a pure function over a set of operations.

`unet(ops, config, x)` is the only definition of the network. What it computes is decided by `ops`: torch tensors
(`torch_ops`), ONNX nodes (`onnx_ops`), or shapes only (`ShapeOps` here, which is how layers and parameters are
listed). Layer names are the module names of the reference checkpoints, except `qkv`: q, k and v of an attention
block read the same input, so they are one layer with one MoDiff state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any, Protocol, TypeVar

from modiff_trt.core.config import Config

GROUPS = 32
NORM_EPS = 1e-6

V = TypeVar("V")


Shape = tuple[int, int, int]


class Role(StrEnum):
    """What a layer is in its network. `input` reads the network's input and `output` gives its answer. A `shortcut` reads what
    the first convolution of its block reads, and is added to what the block's last one gives. `qkv` is q, k and v stacked."""

    INPUT = "input"
    OUTPUT = "output"
    SHORTCUT = "shortcut"
    QKV = "qkv"
    INNER = "inner"


@dataclass(frozen=True)
class LayerSpec:
    """A convolution that can be quantized and modulated. Shapes are (C, H, W) of one image.

    `params` are the checkpoint prefixes whose weights are stacked along the output channels (three for `qkv`).
    `padding` is (top, left, bottom, right), `split` the channel at which a concatenated skip begins (0: none). `upsampled` says
    that each 2x2 block of the input repeats one value (nearest upsampling), so that one value of a_hat stands for four.
    `normalized` says that the input comes from a normalization. `block` is the residual or attention block it belongs to. A
    shortcut is computed `beside` one layer, whose input it shares, and `added_to` the output of another, which runs before it.
    """

    name: str
    params: tuple[str, ...]
    in_shape: Shape
    out_shape: Shape
    kernel: int
    stride: int
    padding: tuple[int, int, int, int]
    split: int = 0
    upsampled: bool = False
    role: Role = Role.INNER
    normalized: bool = False
    block: str = ""
    beside: str = ""
    added_to: str = ""

    @property
    def is_edge(self) -> bool:
        """Whether the layer stands at the network's input or output."""
        return self.role in (Role.INPUT, Role.OUTPUT)

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

    def layer(self, spec: LayerSpec, x: V) -> V:
        """The convolution `spec` of x, in whatever mode it has."""
        ...

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


class Function(Protocol):
    """A network: what it answers to x, over any operations. The timestep is bound into `ops` (see `Ops.add_time`)."""

    def __call__(self, ops: Ops[V], x: V) -> V: ...


def convolution(
    name: str, in_shape: Shape, out_channels: int, kernel: int, *, stride: int = 1, params: tuple[str, ...] = (), **more: Any
) -> LayerSpec:
    """The layer that keeps height and width, or halves them; DDIM pads a strided one only at the bottom and the right."""
    pad = kernel // 2
    padding = (pad, pad, pad, pad) if stride == 1 else (0, 0, 1, 1)
    out_shape = (out_channels, in_shape[1] // stride, in_shape[2] // stride)
    return LayerSpec(
        name, params or (name,), in_shape, out_shape=out_shape, kernel=kernel, stride=stride, padding=padding, **more
    )


def resnet_block(ops: Ops[V], name: str, x: V, in_shape: Shape, out_channels: int, split: int) -> V:
    out_shape = (out_channels, *in_shape[1:])
    first = convolution(f"{name}.conv1", in_shape, out_channels, kernel=3, split=split, normalized=True, block=name)
    last = convolution(f"{name}.conv2", out_shape, out_channels, kernel=3, normalized=True, block=name)
    h = ops.layer(first, ops.norm_silu(f"{name}.norm1", x))
    h = ops.add_time(name, h, out_channels)
    h = ops.layer(last, ops.norm_silu(f"{name}.norm2", h))
    if in_shape == out_shape:
        return ops.block_done(name, x, ops.add(x, h))
    shortcut = convolution(
        f"{name}.nin_shortcut",
        in_shape,
        out_channels,
        kernel=1,
        split=split,
        role=Role.SHORTCUT,
        block=name,
        beside=first.name,
        added_to=last.name,
    )
    return ops.block_done(name, x, ops.add(ops.layer(shortcut, x), h))


def attention_block(ops: Ops[V], name: str, x: V, shape: Shape) -> V:
    channels = shape[0]
    parts = (f"{name}.q", f"{name}.k", f"{name}.v")
    qkv = convolution(f"{name}.qkv", shape, 3 * channels, kernel=1, params=parts, role=Role.QKV, normalized=True, block=name)
    h = ops.attention(ops.layer(qkv, ops.norm(f"{name}.norm", x)), channels)
    h = ops.layer(convolution(f"{name}.proj_out", shape, channels, kernel=1, block=name), h)
    return ops.block_done(name, x, ops.add(x, h))


def unet(ops: Ops[V], config: Config, x: V) -> V:
    """Predicts epsilon, shape of `x` [N, C, H, W]."""
    model = config.model
    size = config.input_shape[1:]
    channels = model.ch
    h = ops.layer(convolution("conv_in", config.input_shape, channels, kernel=3, role=Role.INPUT), x)
    skips = [(h, channels)]
    last = len(model.ch_mult) - 1

    for level, mult in enumerate(model.ch_mult):
        for i in range(model.num_res_blocks):
            h = resnet_block(
                ops, f"down.{level}.block.{i}", h, in_shape=(channels, *size), out_channels=model.ch * mult, split=0
            )
            channels = model.ch * mult
            if size[0] in model.attn_resolutions:
                h = attention_block(ops, f"down.{level}.attn.{i}", h, shape=(channels, *size))
            skips.append((h, channels))
        if level != last:
            if model.resamp_with_conv:
                h = ops.layer(convolution(f"down.{level}.downsample.conv", (channels, *size), channels, kernel=3, stride=2), h)
            else:
                h = ops.avg_pool(h)
            size = (size[0] // 2, size[1] // 2)
            skips.append((h, channels))

    h = resnet_block(ops, "mid.block_1", h, in_shape=(channels, *size), out_channels=channels, split=0)
    h = attention_block(ops, "mid.attn_1", h, shape=(channels, *size))
    h = resnet_block(ops, "mid.block_2", h, in_shape=(channels, *size), out_channels=channels, split=0)

    for level in range(last, -1, -1):
        out_channels = model.ch * model.ch_mult[level]
        for i in range(model.num_res_blocks + 1):
            skip, skip_channels = skips.pop()
            h = ops.concat(h, skip)
            h = resnet_block(
                ops,
                f"up.{level}.block.{i}",
                h,
                in_shape=(channels + skip_channels, *size),
                out_channels=out_channels,
                split=channels,
            )
            channels = out_channels
            if size[0] in model.attn_resolutions:
                h = attention_block(ops, f"up.{level}.attn.{i}", h, shape=(channels, *size))
        if level != 0:
            h = ops.upsample(h)
            size = (2 * size[0], 2 * size[1])
            if model.resamp_with_conv:
                h = ops.layer(
                    convolution(f"up.{level}.upsample.conv", (channels, *size), channels, kernel=3, upsampled=True), h
                )

    h = ops.norm_silu("norm_out", h)
    return ops.layer(convolution("conv_out", (channels, *size), model.out_ch, kernel=3, role=Role.OUTPUT, normalized=True), h)


class ShapeOps:
    """Runs the network on (C, H, W) alone and records its layers, its parameters and its time projections."""

    def __init__(self, ch: int) -> None:
        temb = 4 * ch
        self.layers: list[LayerSpec] = []
        self.norms: list[str] = []
        self.time_channels: dict[str, int] = {}
        self.blocks: list[str] = []
        self.parameters: dict[str, tuple[int, ...]] = {
            "temb.dense.0.weight": (temb, ch),
            "temb.dense.0.bias": (temb,),
            "temb.dense.1.weight": (temb, temb),
            "temb.dense.1.bias": (temb,),
        }
        self._temb = temb

    def layer(self, spec: LayerSpec, x: Shape) -> Shape:
        assert spec.in_shape == x, f"{spec.name} is described for {spec.in_shape} and given {x}"
        self.layers.append(spec)
        channels = spec.out_shape[0] // len(spec.params)
        for part in spec.params:
            self.parameters[f"{part}.weight"] = (channels, x[0], spec.kernel, spec.kernel)
            self.parameters[f"{part}.bias"] = (channels,)
        return spec.out_shape

    def norm(self, name: str, x: Shape) -> Shape:
        self.norms.append(name)
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
    """What a configuration implies: its function, layers and normalizations in execution order, parameter shapes, and time
    projections by block."""

    config: Config
    function: Function
    layers: tuple[LayerSpec, ...]
    norms: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    time_channels: dict[str, int]
    blocks: tuple[str, ...]

    def layer(self, name: str) -> LayerSpec:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        return {spec.name: spec for spec in self.layers}

    @property
    def parameter_count(self) -> int:
        return sum(prod(shape) for shape in self.parameters.values())


def trace(config: Config) -> Network:
    """Lists the network of a configuration, without allocating any of it."""

    def function(ops: Ops[V], x: V) -> V:
        return unet(ops, config, x)

    return traced(config, function)


def traced(config: Config, function: Function) -> Network:
    """Lists a function's network, for inputs and timesteps as `config` has them."""
    ops = ShapeOps(config.model.ch)
    function(ops, config.input_shape)
    return Network(
        config,
        function,
        tuple(ops.layers),
        norms=tuple(ops.norms),
        parameters=ops.parameters,
        time_channels=ops.time_channels,
        blocks=tuple(ops.blocks),
    )
