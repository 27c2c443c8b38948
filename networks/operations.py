"""What networks are made of: layers, and the operations that interpret them.

A network is a pure function over `Ops`. What it computes is decided by them: torch tensors (`torch_ops`), ONNX nodes, lazy
values of native kernels, or shapes alone (`ShapeOps`, which is how layers and parameters are listed).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any, Protocol, TypeVar

from modiff_trt.core.config import Architecture, Config

V = TypeVar("V")


Shape = tuple[int, int, int]
LAYER_NORM_EPS = 1e-5


class Role(StrEnum):
    """What a layer is in its network. `input` reads the network's input and `output` gives its answer. A `shortcut` reads what
    the first convolution of its block reads, and is added to what the block's last one gives. `qkv` is q, k and v stacked."""

    INPUT = "input"
    OUTPUT = "output"
    SHORTCUT = "shortcut"
    QKV = "qkv"
    INNER = "inner"


class Norm(StrEnum):
    """The normalization that a layer's input comes from."""

    NONE = ""
    GROUP = "group"
    LAYER = "layer"


@dataclass(frozen=True)
class LayerSpec:
    """A convolution that can be quantized and modulated. Shapes are (C, H, W) of one image.

    `params` are the checkpoint prefixes whose weights are stacked along the output channels (three for `qkv`).
    `padding` is (top, left, bottom, right), `split` the channel at which a concatenated skip begins (0: none). `upsampled` says
    that each 2x2 block of the input repeats one value (nearest upsampling), so that one value of a_hat stands for four.
    `normalized` says from which normalization the input comes. `block` is the residual or attention block it belongs to. A
    shortcut is computed `beside` one layer, whose input it shares, and `added_to` the output of another, which runs before it.
    One that is not `biased` has no bias among the parameters.
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
    normalized: Norm = Norm.NONE
    block: str = ""
    beside: str = ""
    added_to: str = ""
    biased: bool = True

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


class Block(Protocol):
    """A part of the network with one input, over any operations."""

    def __call__(self, ops: Ops[V], x: V) -> V: ...


class Ops(Protocol[V]):
    """What the network is made of. `V` is a tensor, or whatever stands for one."""

    def layer(self, spec: LayerSpec, x: V) -> V:
        """The convolution `spec` of x, in whatever mode it has."""
        ...

    def norm(self, name: str, x: V, groups: int, eps: float) -> V:
        """Group norm, statistics over the pixels and channels of a group."""
        ...

    def norm_silu(self, name: str, x: V, groups: int, eps: float) -> V: ...
    def timed_norm_silu(self, block: str, name: str, x: V, groups: int, eps: float) -> V:
        """SiLU of the group norm times 1 + scale, plus shift, which the timestep gives to `block`."""
        ...

    def add(self, a: V, b: V) -> V: ...
    def add_time(self, block: str, x: V, channels: int) -> V: ...
    def concat(self, a: V, b: V) -> V: ...
    def attention(self, qkv: V, channels: int, heads: int) -> V:
        """Attention of all pixels to all. `qkv` has `channels` of each, head by head, scaled by the root of a head's."""
        ...

    def layer_norm(self, name: str, x: V) -> V:
        """Normalization over the channels of each pixel."""
        ...

    def geglu(self, x: V) -> V:
        """The first half of the channels times the GELU of the second (arXiv 2002.05202)."""
        ...

    def cross_attention(self, name: str, q: V, channels: int, heads: int) -> V:
        """Attention of all pixels to the prompt, whose keys and values are bound under `name`."""
        ...

    def upsample(self, x: V) -> V: ...
    def avg_pool(self, x: V) -> V: ...
    def block(self, name: str, body: Block, x: V) -> V:
        """`body(self, x)`: a residual block or an attention, which calibration learns as a whole. Blocks hold no others."""
        ...


class Function(Protocol):
    """A network: what it answers to x, over any operations. The timestep is bound into `ops` (see `Ops.add_time`)."""

    def __call__(self, ops: Ops[V], x: V) -> V: ...


def convolution(
    name: str, in_shape: Shape, out_channels: int, kernel: int, *, stride: int = 1, params: tuple[str, ...] = (), **more: Any
) -> LayerSpec:
    """The layer that keeps height and width, or halves them. A strided one is padded at the bottom and the right alone, if
    `padding` does not say otherwise."""
    pad = kernel // 2
    padding = more.pop("padding", (pad, pad, pad, pad) if stride == 1 else (0, 0, 1, 1))
    out_shape = (out_channels, in_shape[1] // stride, in_shape[2] // stride)
    return LayerSpec(
        name, params or (name,), in_shape, out_shape=out_shape, kernel=kernel, stride=stride, padding=padding, **more
    )


class ShapeOps:
    """Runs the network on (C, H, W) alone and records its layers, its parameters and its time projections."""

    def __init__(self, architecture: Architecture) -> None:
        a, time_channels, self._cross_channels = architecture, architecture.time_channels, architecture.cross_channels
        self.layers: list[LayerSpec] = []
        self.norms: list[str] = []
        self.time_channels: dict[str, int] = {}
        self.blocks: dict[str, Block] = {}
        self.parameters: dict[str, tuple[int, ...]] = {
            "time_embedding.linear_1.weight": (time_channels, a.base),
            "time_embedding.linear_1.bias": (time_channels,),
            "time_embedding.linear_2.weight": (time_channels, time_channels),
            "time_embedding.linear_2.bias": (time_channels,),
        }
        if a.classes:
            self.parameters["class_embedding.weight"] = (a.classes, time_channels)
        if a.added_channels:
            for part, inputs in (("linear_1", a.added_channels), ("linear_2", time_channels)):
                self.parameters[f"add_embedding.{part}.weight"] = (time_channels, inputs)
                self.parameters[f"add_embedding.{part}.bias"] = (time_channels,)
        self.prompted: list[str] = []
        self._time_channels = time_channels

    def layer(self, spec: LayerSpec, x: Shape) -> Shape:
        assert spec.in_shape == x, f"{spec.name} is described for {spec.in_shape} and given {x}"
        self.layers.append(spec)
        channels = spec.out_shape[0] // len(spec.params)
        for part in spec.params:
            self.parameters[f"{part}.weight"] = (channels, x[0], spec.kernel, spec.kernel)
            if spec.biased:
                self.parameters[f"{part}.bias"] = (channels,)
        return spec.out_shape

    def norm(self, name: str, x: Shape, groups: int, eps: float) -> Shape:
        assert x[0] % groups == 0, f"{name} normalizes {x[0]} channels in {groups} groups"
        self.norms.append(name)
        self.parameters[f"{name}.weight"] = self.parameters[f"{name}.bias"] = (x[0],)
        return x

    norm_silu = norm

    def timed_norm_silu(self, block: str, name: str, x: Shape, groups: int, eps: float) -> Shape:
        self._times(block, 2 * x[0])
        return self.norm(name, x, groups, eps)

    def add(self, a: Shape, b: Shape) -> Shape:
        assert a == b
        return a

    def add_time(self, block: str, x: Shape, channels: int) -> Shape:
        self._times(block, channels)
        return x

    def _times(self, block: str, channels: int) -> None:
        self.time_channels[block] = channels
        self.parameters[f"{block}.time_emb_proj.weight"] = (channels, self._time_channels)
        self.parameters[f"{block}.time_emb_proj.bias"] = (channels,)

    def concat(self, a: Shape, b: Shape) -> Shape:
        return (a[0] + b[0], *a[1:])

    def attention(self, qkv: Shape, channels: int, heads: int) -> Shape:
        assert qkv[0] == 3 * channels and channels % heads == 0
        return (channels, *qkv[1:])

    def layer_norm(self, name: str, x: Shape) -> Shape:
        return self.norm(name, x, 1, LAYER_NORM_EPS)

    def geglu(self, x: Shape) -> Shape:
        return (x[0] // 2, *x[1:])

    def cross_attention(self, name: str, q: Shape, channels: int, heads: int) -> Shape:
        assert q[0] == channels and channels % heads == 0
        self.prompted.append(name)
        for part in ("to_k", "to_v"):
            self.parameters[f"{name}.{part}.weight"] = (channels, self._cross_channels)
        return q

    def upsample(self, x: Shape) -> Shape:
        return (x[0], 2 * x[1], 2 * x[2])

    def avg_pool(self, x: Shape) -> Shape:
        return (x[0], x[1] // 2, x[2] // 2)

    def block(self, name: str, body: Block, x: Shape) -> Shape:
        self.blocks[name] = body
        return body(self, x)


@dataclass(frozen=True)
class Network:
    """What a configuration implies: its function, layers and normalizations in execution order, parameter shapes, time
    projections by block, what the blocks do, and the attentions to a prompt."""

    config: Config
    function: Function
    layers: tuple[LayerSpec, ...]
    norms: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    time_channels: dict[str, int]
    blocks: dict[str, Block]
    prompted: tuple[str, ...]

    def layer(self, name: str) -> LayerSpec:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        return {spec.name: spec for spec in self.layers}

    @property
    def parameter_count(self) -> int:
        return sum(prod(shape) for shape in self.parameters.values())


def traced(config: Config, function: Function) -> Network:
    """Lists a function's network, for inputs and timesteps as `config` has them."""
    ops = ShapeOps(config.architecture)
    function(ops, config.input_shape)
    return Network(
        config,
        function,
        tuple(ops.layers),
        norms=tuple(ops.norms),
        parameters=ops.parameters,
        time_channels=ops.time_channels,
        blocks=ops.blocks,
        prompted=tuple(ops.prompted),
    )
