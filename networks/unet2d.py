"""The UNet of diffusers' `UNet2DModel` and `UNet2DConditionModel`, written once, as a pure function over a set of operations.

`unet2d(ops, architecture, x)` is the only definition of a network here: the DDPM and DDIM UNets (arXiv 2006.11239, 2010.02502)
are among its configurations. Tokens are pixels: transformer blocks never leave the image's shape. Names are diffusers' module
names, except `to_qkv`: q, k and v of an attention read the same input, so they are one layer with one MoDiff state.
"""

from __future__ import annotations

from typing import Any, TypeVar

from modiff_trt.core.config import Architecture, Config
from modiff_trt.core.kinds import Resampling
from modiff_trt.networks.operations import LayerSpec, Network, Norm, Ops, Role, Shape, V, convolution, traced

W = TypeVar("W")
# Of the normalization before transformer blocks, whatever `eps` says; and how much wider their last layers are.
TRANSFORMER_EPS, EXPANSION = 1e-6, 4


def resnet(
    ops: Ops[V],
    a: Architecture,
    name: str,
    x: V,
    in_shape: Shape,
    out_channels: int,
    *,
    split: int = 0,
    half: bool = False,
    double: bool = False,
) -> V:
    """A residual block, of an image that it may `half` or `double` on the way; the skip of its input begins at `split`."""
    channels, height, width = in_shape
    if half:
        in_shape = (channels, height // 2, width // 2)
    if double:
        in_shape = (channels, 2 * height, 2 * width)
    out_shape = (out_channels, *in_shape[1:])
    first_norm = Norm.NONE if half else Norm.GROUP  # pooling comes between
    first = convolution(
        f"{name}.conv1", in_shape, out_channels, kernel=3, split=split, upsampled=double, normalized=first_norm, block=name
    )
    last = convolution(f"{name}.conv2", out_shape, out_channels, kernel=3, normalized=Norm.GROUP, block=name)
    shortcut = convolution(
        f"{name}.conv_shortcut",
        in_shape,
        out_channels,
        kernel=1,
        split=split,
        role=Role.SHORTCUT,
        block=name,
        beside=first.name,
        added_to=last.name,
    )

    def body(ops: Ops[W], x: W) -> W:
        h = ops.norm_silu(f"{name}.norm1", x, a.groups, a.eps)
        if half:
            x, h = ops.avg_pool(x), ops.avg_pool(h)
        if double:
            x, h = ops.upsample(x), ops.upsample(h)
        h = ops.layer(first, h)
        if a.scale_shift:
            h = ops.timed_norm_silu(name, f"{name}.norm2", h, a.groups, a.eps)
        else:
            h = ops.norm_silu(f"{name}.norm2", ops.add_time(name, h, out_channels), a.groups, a.eps)
        h = ops.layer(last, h)
        return ops.add(x if in_shape == out_shape else ops.layer(shortcut, x), h)

    return ops.block(name, body, x)


def pixel_attention(ops: Ops[V], a: Architecture, name: str, x: V, shape: Shape, heads: int, *, normed: bool = True) -> V:
    """Self-attention of the pixels, added to its input."""
    channels = shape[0]
    parts = (f"{name}.to_q", f"{name}.to_k", f"{name}.to_v")
    norm = Norm.GROUP if normed else Norm.NONE
    qkv = convolution(f"{name}.to_qkv", shape, 3 * channels, kernel=1, params=parts, role=Role.QKV, normalized=norm, block=name)
    out = convolution(f"{name}.to_out.0", shape, channels, kernel=1, block=name)

    def body(ops: Ops[W], x: W) -> W:
        h = ops.norm(f"{name}.group_norm", x, a.groups, a.eps) if normed else x
        h = ops.attention(ops.layer(qkv, h), channels, heads)
        return ops.add(x, ops.layer(out, h))

    return ops.block(name, body, x)


def transformer_block(ops: Ops[V], name: str, x: V, shape: Shape, heads: int) -> V:
    """Attention of pixels to pixels, then to the prompt, then two layers at each pixel (diffusers' `BasicTransformerBlock`). A
    linear layer is a 1x1 convolution."""
    channels = shape[0]

    def linear(part: str, inputs: int, outputs: int, **more: Any) -> LayerSpec:
        return convolution(f"{name}.{part}", (inputs, *shape[1:]), outputs, kernel=1, block=name, **more)

    parts = tuple(f"{name}.attn1.to_{part}" for part in "qkv")
    qkv = linear("attn1.to_qkv", channels, 3 * channels, params=parts, role=Role.QKV, biased=False, normalized=Norm.LAYER)
    out1, out2 = (linear(f"attn{i}.to_out.0", channels, channels) for i in (1, 2))
    q = linear("attn2.to_q", channels, channels, biased=False, normalized=Norm.LAYER)
    wide = linear("ff.net.0.proj", channels, 2 * EXPANSION * channels, normalized=Norm.LAYER)
    narrow = linear("ff.net.2", EXPANSION * channels, channels)

    def body(ops: Ops[W], x: W) -> W:
        h = ops.attention(ops.layer(qkv, ops.layer_norm(f"{name}.norm1", x)), channels, heads)
        x = ops.add(x, ops.layer(out1, h))
        h = ops.layer(q, ops.layer_norm(f"{name}.norm2", x))
        x = ops.add(x, ops.layer(out2, ops.cross_attention(f"{name}.attn2", h, channels, heads)))
        h = ops.geglu(ops.layer(wide, ops.layer_norm(f"{name}.norm3", x)))
        return ops.add(x, ops.layer(narrow, h))

    return ops.block(name, body, x)


def attention(ops: Ops[V], a: Architecture, name: str, x: V, shape: Shape, heads: int, depth: int, *, normed: bool = True) -> V:
    """Attention of a level: of its pixels, or as many transformer blocks as `depth` says between two projections."""
    if not depth:
        return pixel_attention(ops, a, name, x, shape=shape, heads=heads, normed=normed)
    into, out = (convolution(f"{name}.proj_{part}", shape, shape[0], kernel=1) for part in ("in", "out"))
    h = ops.layer(into, ops.norm(f"{name}.norm", x, a.groups, TRANSFORMER_EPS))
    for i in range(depth):
        h = transformer_block(ops, f"{name}.transformer_blocks.{i}", h, shape=shape, heads=heads)
    return ops.add(x, ops.layer(out, h))


def unet2d(ops: Ops[V], a: Architecture, x: V) -> V:
    """What the network answers to x [N, in_channels, H, W]: [N, out_channels, H, W]."""
    size, channels, last = (a.height, a.width), a.base, len(a.channels) - 1
    h = ops.layer(convolution("conv_in", (a.in_channels, *size), channels, kernel=3, role=Role.INPUT), x)
    skips = [(h, channels)]

    for level, wide in enumerate(a.channels):
        block = f"down_blocks.{level}"
        for i in range(a.layers[level]):
            h = resnet(ops, a, f"{block}.resnets.{i}", h, in_shape=(channels, *size), out_channels=wide)
            channels = wide
            if a.down_heads[level]:
                heads, depth = a.down_heads[level], a.down_depth[level]
                h = attention(ops, a, f"{block}.attentions.{i}", h, shape=(channels, *size), heads=heads, depth=depth)
            skips.append((h, channels))
        if level != last:
            shape = (channels, *size)
            if a.down_sampling[level] is Resampling.CONV:
                padding = (1, 1, 1, 1) if a.down_padding else (0, 0, 1, 1)
                halving = convolution(f"{block}.downsamplers.0.conv", shape, channels, kernel=3, stride=2, padding=padding)
                h = ops.layer(halving, h)
            elif a.down_sampling[level] is Resampling.RESNET:
                h = resnet(ops, a, f"{block}.downsamplers.0", h, in_shape=shape, out_channels=channels, half=True)
            else:
                h = ops.avg_pool(h)
            size = (size[0] // 2, size[1] // 2)
            skips.append((h, channels))

    shape = (channels, *size)
    h = resnet(ops, a, "mid_block.resnets.0", h, in_shape=shape, out_channels=channels)
    if a.mid_heads:
        h = attention(ops, a, "mid_block.attentions.0", h, shape=shape, heads=a.mid_heads, depth=a.mid_depth, normed=a.mid_norm)
    h = resnet(ops, a, "mid_block.resnets.1", h, in_shape=shape, out_channels=channels)

    for step, wide in enumerate(reversed(a.channels)):
        block, level = f"up_blocks.{step}", last - step
        for i in range(a.layers[level] + 1):
            skip, skip_channels = skips.pop()
            joined = (channels + skip_channels, *size)
            h = resnet(ops, a, f"{block}.resnets.{i}", ops.concat(h, skip), in_shape=joined, out_channels=wide, split=channels)
            channels = wide
            if a.up_heads[step]:
                heads, depth = a.up_heads[step], a.up_depth[step]
                h = attention(ops, a, f"{block}.attentions.{i}", h, shape=(channels, *size), heads=heads, depth=depth)
        if level:
            shape, size = (channels, *size), (2 * size[0], 2 * size[1])
            if a.up_sampling[step] is Resampling.CONV:
                doubling = convolution(f"{block}.upsamplers.0.conv", (channels, *size), channels, kernel=3, upsampled=True)
                h = ops.layer(doubling, ops.upsample(h))
            elif a.up_sampling[step] is Resampling.RESNET:
                h = resnet(ops, a, f"{block}.upsamplers.0", h, in_shape=shape, out_channels=channels, double=True)
            else:
                h = ops.upsample(h)

    h = ops.norm_silu("conv_norm_out", h, a.groups, a.eps)
    out = convolution("conv_out", (channels, *size), a.out_channels, kernel=3, role=Role.OUTPUT, normalized=Norm.GROUP)
    return ops.layer(out, h)


def trace(config: Config) -> Network:
    """Lists the network of a configuration, without allocating any of it."""

    def function(ops: Ops[V], x: V) -> V:
        return unet2d(ops, config.architecture, x)

    return traced(config, function)
