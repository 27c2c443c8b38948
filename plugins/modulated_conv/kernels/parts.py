"""Triton: parts of the kernels that gather a layer's input: sources, tiles, groups, SiLU, rounding, and where integers go."""

from __future__ import annotations

import triton
import triton.language as tl

from modiff_trt.core.moving_grids import CHANNEL, PARTS

# 1.5 * 2^23, and its bits: a float32 of small magnitude plus this number is rounded to the nearest integer, half to even,
# which stands in the low bits. Conversion instructions run at a quarter of the rate of additions.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
SHIFT_PARTS, CHANNEL_PARTS = tl.constexpr(PARTS), tl.constexpr(CHANNEL)


@triton.jit
def source(
    a_ptr, b_ptr, skip_ptr, sum_ptr, pixel, channel, mask,
    C1: tl.constexpr, C2: tl.constexpr, HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_P, BLOCK_C] of the layer's sources; writes a + b where asked. Pointers are those of one image."""
    main = mask
    if C2 > 0:
        main = mask & (channel < C1)
    at = pixel * C1 + channel
    value = tl.load(a_ptr + at, mask=main, other=0.0).to(tl.float32)
    if HAS_B:
        value += tl.load(b_ptr + at, mask=main, other=0.0).to(tl.float32)
        narrow = value.to(a_ptr.dtype.element_ty)
        if WRITE_SUM:
            tl.store(sum_ptr + at, narrow, mask=main)
        value = narrow.to(tl.float32)
    if C2 > 0:
        skip = tl.load(skip_ptr + pixel * C2 + (channel - C1), mask=mask & (channel >= C1), other=0.0)
        value += skip.to(tl.float32)
    return value


@triton.jit
def tile_mask(
    exists, pixel, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """[BLOCK_P, BLOCK_C]: which elements of a tile exist; a constant where all do, so that loads need no predicate."""
    if C % BLOCK_C == 0 and PIXELS % BLOCK_P == 0:
        return tl.full([BLOCK_P, BLOCK_C], True, tl.int1)
    return exists & (pixel < PIXELS)


@triton.jit
def shifted(integer):
    """Integers of magnitude below 2^22 as float32, plus MAGIC."""
    return (integer.to(tl.int32) + MAGIC_BITS).to(tl.float32, bitcast=True)


@triton.jit
def integer_of(value):
    """int32 of what `shifted` gives, or of a float32 to which MAGIC was added."""
    return value.to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def store_integers(
    q_ptr, values, pixel, channel, mask,
    WIDTH: tl.constexpr, PITCH: tl.constexpr, UPSAMPLE: tl.constexpr, Q_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of one image's values, in rows of WIDTH, to q [pixels, Q_CHANNELS] in rows of PITCH, with UPSAMPLE each to 2x2
    pixels."""
    if UPSAMPLE:
        corner = (pixel // WIDTH) * (2 * PITCH) + (pixel % WIDTH) * 2
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                to = corner + down * PITCH + right
                tl.store(q_ptr + to * Q_CHANNELS + channel, values, mask=mask)
    else:
        to = pixel
        if PITCH != WIDTH:
            to = (pixel // WIDTH) * PITCH + pixel % WIDTH
        tl.store(q_ptr + to * Q_CHANNELS + channel, values, mask=mask)


@triton.jit
def shift_of(channel, phase):
    """float32, what a moving grid is shifted by in a channel, in steps (`core.moving_grids`)."""
    return ((channel * CHANNEL_PARTS + phase.to(tl.int32)) & (SHIFT_PARTS - 1)).to(tl.float32) * (1.0 / SHIFT_PARTS) - 0.5


@triton.jit
def silu_of(value, FAST: tl.constexpr):
    """x sigmoid(x); FAST with the GPU's approximate exponential and reciprocal (2^-22 relative)."""
    if FAST:
        beyond = 1.0 + tl.math.exp2(value * -1.4426950408889634)
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [beyond], dtype=tl.float32, is_pure=True, pack=1
        )
        return value * inverse
    return value * tl.sigmoid(value)


@triton.jit
def channels_of(
    start, C: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """(channel, whether it exists), [1, BLOCK_G * LANES]: BLOCK_G groups, or parts of such, from channel `start`, each of
    PER_GROUP channels padded to LANES lanes."""
    lane = tl.arange(0, BLOCK_G * LANES)[None, :]
    if LANES == PER_GROUP:
        channel = start + lane
        return channel, channel < C
    channel = start + (lane // LANES) * PER_GROUP + lane % LANES
    return channel, (lane % LANES < PER_GROUP) & (channel < C)


@triton.jit
def over_groups(value, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_P, BLOCK_G * LANES] -> sums over each group, or part of one, [BLOCK_G]."""
    # First over channels, which one thread or its neighbours hold, then over pixels: other warps have those, and what goes from
    # warp to warp through shared memory is what a kernel would wait for.
    return tl.sum(tl.sum(tl.reshape(value, [BLOCK_P, BLOCK_G, LANES]), axis=2), axis=0)


@triton.jit
def to_channels(by_group, BLOCK_G: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_G] -> each group's value on its lanes [1, BLOCK_G * LANES]."""
    return tl.reshape(tl.broadcast_to(by_group[:, None], [BLOCK_G, LANES]), [BLOCK_G * LANES])[None, :]
