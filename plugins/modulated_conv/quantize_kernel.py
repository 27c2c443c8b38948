"""Triton: from a layer's sources to its int8 input, with `a_hat` updated in place. See `reference` for what is computed.

Small images take one launch, in which a program holds whole normalization groups of one image. Larger ones take two: the
first sums the groups (and writes a pending residual sum), the second does everything else in one pass. Tilings do not depend
on the batch, so that the batch cannot change an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from modiff_trt.plugins.modulated_conv.reference import STATE_MAX, InputShape

# Images of at most so many pixels are normalized in one launch.
SMALL = 64
# Pixels whose sums one program of the first launch takes, and pixels that one of the second covers.
SLAB = 64
ROWS = 32
# 1.5 * 2^23: adding and subtracting it rounds a float32 of small magnitude to the nearest integer, half to even.
ROUND = tl.constexpr(12582912.0)
LIMIT = tl.constexpr(float(STATE_MAX))


@dataclass(frozen=True)
class Norm:
    """Group normalization: gain and shift float32 [C], the number of groups, epsilon."""

    gain: Tensor
    shift: Tensor
    groups: int
    eps: float


@triton.jit
def _source(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr,
    HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_P, BLOCK_C] of the layer's sources; writes a + b where asked."""
    at = image * PIXELS + pixel
    main = mask & (channel < C1)
    value = tl.load(a_ptr + at * C1 + channel, mask=main, other=0.0).to(tl.float32)
    if HAS_B:
        value += tl.load(b_ptr + at * C1 + channel, mask=main, other=0.0).to(tl.float32)
        narrow = value.to(a_ptr.dtype.element_ty)
        if WRITE_SUM:
            tl.store(sum_ptr + at * C1 + channel, narrow, mask=main)
        value = narrow.to(tl.float32)
    if C2 > 0:
        skip = tl.load(skip_ptr + at * C2 + (channel - C1), mask=mask & (channel >= C1), other=0.0)
        value += skip.to(tl.float32)
    if HAS_TIME:
        value += tl.load(time_ptr + channel, mask=channel < C1 + C2, other=0.0)
        value = tl.where(mask, value, 0.0)
    return value


@triton.jit
def _emit(
    value, factor_ptr, grid_ptr, state_ptr, q_ptr, image, pixel, channel, mask,
    C: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, UPSAMPLE: tl.constexpr,
    Q_CHANNELS: tl.constexpr, HAS_FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Rounds the residual of `value`, moves the state by it and writes the integers (or `value` itself)."""
    if HAS_FACTOR:
        value *= tl.load(factor_ptr + channel, mask=channel < C, other=0.0)
    if QUANTIZE:
        inverse_step = tl.load(grid_ptr)
        if MODULATED:
            at = state_ptr + (image * PIXELS + pixel) * C + channel
            state = tl.load(at, mask=mask, other=0).to(tl.float32)
            value -= state * tl.load(grid_ptr + 1)
        value = tl.minimum(tl.maximum(value * inverse_step, LOW), HIGH)
        value = (value + ROUND) - ROUND
        if MODULATED:
            state += value * tl.load(grid_ptr + 2)
            tl.store(at, tl.minimum(tl.maximum(state, -LIMIT), LIMIT).to(tl.int16), mask=mask)
    narrow = value.to(q_ptr.dtype.element_ty)
    if UPSAMPLE:
        corner = image * (4 * PIXELS) + (pixel // WIDTH) * (4 * WIDTH) + (pixel % WIDTH) * 2
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                to = corner + down * (2 * WIDTH) + right
                tl.store(q_ptr + to * Q_CHANNELS + channel, narrow, mask=mask)
    else:
        tl.store(q_ptr + (image * PIXELS + pixel) * Q_CHANNELS + channel, narrow, mask=mask)


@triton.jit
def _membership(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_G, BLOCK_C]: whether a channel of the tile belongs to a group of the tile."""
    lane = tl.arange(0, BLOCK_C)[None, :]
    return (lane // PER_GROUP == tl.arange(0, BLOCK_G)[:, None]) & (lane < CHANNELS)


@triton.jit
def sums_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, partial_ptr,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr,
    HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, SLABS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (n, j, s): sums and sums of squares of the j-th CHANNELS channels' groups over the s-th slab of image n."""
    image = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(2)
    lane = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.program_id(1) * CHANNELS + lane
    pixel = slab * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = (lane < CHANNELS) & (channel < C1 + C2) & (pixel < PIXELS)
    value = _source(
        a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
        C1, C2, PIXELS, HAS_B, WRITE_SUM, HAS_TIME,
    )  # fmt: skip
    member = _membership(CHANNELS, BLOCK_C, PER_GROUP, BLOCK_G)
    sums = tl.sum(value, axis=0)
    squares = tl.sum(value * value, axis=0)
    group = tl.arange(0, BLOCK_G)
    at = partial_ptr + (image * SLABS + slab) * (2 * GROUPS) + tl.program_id(1) * (CHANNELS // PER_GROUP) + group
    known = group < CHANNELS // PER_GROUP
    tl.store(at, tl.sum(tl.where(member, sums[None, :], 0.0), axis=1), mask=known)
    tl.store(at + GROUPS, tl.sum(tl.where(member, squares[None, :], 0.0), axis=1), mask=known)


@triton.jit
def quantize_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, partial_ptr, gain_ptr, shift_ptr, factor_ptr, grid_ptr, state_ptr, q_ptr, eps,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, Q_CHANNELS: tl.constexpr,
    UPSAMPLE: tl.constexpr, HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    SLABS: tl.constexpr, BLOCK_S: tl.constexpr, HAS_FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (n, j, k) covers CHANNELS channels from j * CHANNELS of the k-th BLOCK_P pixels of image n.

    NORM is 0 (none), 1 (the groups' sums are in `partial_ptr`) or 2 (the program holds whole groups and sums them itself).
    """
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.program_id(1) * CHANNELS + lane
    pixel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    inside = (lane < CHANNELS) & (channel < C1 + C2)
    mask = inside & (pixel < PIXELS)
    value = _source(
        a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
        C1, C2, PIXELS, HAS_B, WRITE_SUM, HAS_TIME,
    )  # fmt: skip
    if NORM > 0:
        member = _membership(CHANNELS, BLOCK_C, PER_GROUP, BLOCK_G)
        count = PIXELS * PER_GROUP
        if NORM == 1:
            slab = tl.arange(0, BLOCK_S)[:, None]
            group = tl.arange(0, BLOCK_G)[None, :]
            at = partial_ptr + (image * SLABS + slab) * (2 * GROUPS) + tl.program_id(1) * (CHANNELS // PER_GROUP) + group
            known = (slab < SLABS) & (group < CHANNELS // PER_GROUP)
            mean = tl.sum(tl.load(at, mask=known, other=0.0), axis=0) / count
            power = tl.sum(tl.load(at + GROUPS, mask=known, other=0.0), axis=0) / count
            spread = tl.rsqrt(tl.maximum(power - mean * mean, 0.0) + eps)
            value -= tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)[None, :]
        else:
            sums = tl.sum(value, axis=0)
            mean = tl.sum(tl.where(member, sums[None, :], 0.0), axis=1) / count
            value = tl.where(mask, value - tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)[None, :], 0.0)
            squares = tl.sum(value * value, axis=0)
            spread = tl.rsqrt(tl.sum(tl.where(member, squares[None, :], 0.0), axis=1) / count + eps)
        factor = tl.sum(tl.where(member, spread[:, None], 0.0), axis=0)[None, :]
        factor *= tl.load(gain_ptr + channel, mask=inside, other=0.0)
        value = value * factor + tl.load(shift_ptr + channel, mask=inside, other=0.0)
    if SILU:
        value *= tl.sigmoid(value)
    _emit(
        value, factor_ptr, grid_ptr, state_ptr, q_ptr, image, pixel, channel, mask,
        C1 + C2, PIXELS, WIDTH, UPSAMPLE, Q_CHANNELS, HAS_FACTOR, QUANTIZE, MODULATED, LOW, HIGH,
    )  # fmt: skip


def group_channels(shape: InputShape, groups: int, least: int, most: int) -> int:
    """Channels of a program: whole groups, at least `least` channels if the layer has them, at most `most`."""
    per_group = shape.total // groups
    fitting = [g * per_group for g in range(1, groups + 1) if groups % g == 0 and g * per_group <= most]
    return next((c for c in fitting if c >= least), max(fitting, default=per_group))


def tiling(shape: InputShape, groups: int) -> tuple[int, int, int]:
    """(channels, pixels, warps) of a program of the quantizing launch."""
    if not groups:
        channels = min(triton.next_power_of_2(shape.total), 128)
        return channels, min(triton.next_power_of_2(shape.pixels), max(1, 2048 // channels)), 8
    if shape.pixels <= SMALL:
        return group_channels(shape, groups, 32, 64), triton.next_power_of_2(shape.pixels), 4
    return group_channels(shape, groups, 96, 128), ROWS, 8


def quantize_input(
    shape: InputShape,
    a: Tensor,
    out: Tensor,
    *,
    b: Tensor | None = None,
    total: Tensor | None = None,
    skip: Tensor | None = None,
    time: Tensor | None = None,
    norm: Norm | None = None,
    silu: bool = False,
    factors: Tensor | None = None,
    grid: Tensor | None = None,
    bits: int = 8,
    state: Tensor | None = None,
) -> None:
    """Launches the kernels on torch's current stream.

    a, b [N, pixels, channels] and skip [N, pixels, skip_channels] float16 or float32, `total` receives a + b;
    time float32 [C]; factors float32 [C]; grid float32 [>=3] on the device: 1/step, unit, multiple. `out` int8
    [N, out_pixels, >= C] receives the integers, or, of a float type and without `grid`, the layer's input itself. `state` int16
    [N, pixels, C] is updated in place; without it the layer is stateless.
    """
    c, pixels = shape.total, shape.pixels
    top = 2 ** (bits - 1) - 1
    groups = norm.groups if norm is not None else 0
    per_group = c // groups if groups else 1
    channels, block_p, warps = tiling(shape, groups)
    slabs = triton.cdiv(pixels, SLAB)
    two_launches = groups > 0 and pixels > SMALL
    tile = {
        "C1": shape.channels,
        "C2": shape.skip_channels,
        "PIXELS": pixels,
        "PER_GROUP": per_group,
        "GROUPS": groups,
        "SLABS": slabs,
        "CHANNELS": channels,
        "BLOCK_C": triton.next_power_of_2(channels),
        "BLOCK_G": triton.next_power_of_2(max(channels // per_group, 1)) if groups else 1,
    }
    partial = a
    if two_launches:
        partial = torch.empty(len(a), slabs, 2, groups, device=a.device)
        sums_kernel[(len(a), c // channels, slabs)](
            a,
            b if b is not None else a,
            skip if skip is not None else a,
            time if time is not None else a,
            total if total is not None else a,
            partial,
            HAS_B=b is not None,
            WRITE_SUM=total is not None,
            HAS_TIME=time is not None,
            BLOCK_P=SLAB,
            num_warps=8,
            **tile,
        )
        if total is not None:
            a, b, total = total, None, None
    quantize_kernel[(len(a), triton.cdiv(c, channels), triton.cdiv(pixels, block_p))](
        a,
        b if b is not None else a,
        skip if skip is not None else a,
        time if time is not None else a,
        total if total is not None else a,
        partial,
        norm.gain if norm is not None else a,
        norm.shift if norm is not None else a,
        factors if factors is not None else a,
        grid if grid is not None else a,
        state if state is not None else a,
        out,
        norm.eps if norm is not None else 0.0,
        WIDTH=shape.width,
        Q_CHANNELS=out.shape[2],
        UPSAMPLE=shape.upsample,
        HAS_B=b is not None,
        WRITE_SUM=total is not None,
        HAS_TIME=time is not None,
        NORM=0 if norm is None else (1 if two_launches else 2),
        SILU=silu,
        BLOCK_S=triton.next_power_of_2(slabs),
        HAS_FACTOR=factors is not None,
        QUANTIZE=grid is not None,
        MODULATED=state is not None,
        LOW=float(-top - 1),
        HIGH=float(top),
        BLOCK_P=block_p,
        num_warps=warps,
        **tile,
    )
