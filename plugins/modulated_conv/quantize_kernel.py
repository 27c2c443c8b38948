"""Triton: one launch from a layer's sources to its int8 input, with `a_hat` updated in place.

A program holds whole normalization groups of one image, so that statistics, normalization, SiLU, the residual and its
rounding need one pass over memory. See `reference` for what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from modiff_trt.plugins.modulated_conv.reference import STATE_MAX, InputShape

# Elements that one program keeps in registers, and channels that it covers at least.
TILE = 8192
WIDTH = 32
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
def quantize_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, gain_ptr, shift_ptr, factor_ptr, grid_ptr, state_ptr, q_ptr, eps,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, Q_CHANNELS: tl.constexpr,
    UPSAMPLE: tl.constexpr, HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, PER_GROUP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (n, j) covers image n and CHANNELS channels from j * CHANNELS, in BLOCK_P pixels at a time.

    Without NORM there is nothing to reduce, and program (n, j, k) covers the k-th BLOCK_P pixels only.
    """
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.program_id(1) * CHANNELS + lane
    inside = (lane < CHANNELS) & (channel < C1 + C2)
    C: tl.constexpr = C1 + C2
    if not NORM:
        pixel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        mask = inside & (pixel < PIXELS)
        value = _source(
            a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
            C1, C2, PIXELS, HAS_B, WRITE_SUM, HAS_TIME,
        )  # fmt: skip
        if SILU:
            value *= tl.sigmoid(value)
        _emit(
            value, factor_ptr, grid_ptr, state_ptr, q_ptr, image, pixel, channel, mask,
            C, PIXELS, WIDTH, UPSAMPLE, Q_CHANNELS, HAS_FACTOR, QUANTIZE, MODULATED, LOW, HIGH,
        )  # fmt: skip
    else:
        count = PIXELS * PER_GROUP
        same = (tl.arange(0, BLOCK_C)[:, None] // PER_GROUP) == (lane // PER_GROUP)
        gain = tl.load(gain_ptr + channel, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=inside, other=0.0)
        if BLOCK_P >= PIXELS:
            pixel = tl.arange(0, BLOCK_P)[:, None]
            mask = inside & (pixel < PIXELS)
            value = _source(
                a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
                C1, C2, PIXELS, HAS_B, WRITE_SUM, HAS_TIME,
            )  # fmt: skip
            sums = tl.sum(value, axis=0)
            mean = tl.sum(tl.where(same, sums[:, None], 0.0), axis=0)[None, :] / count
            value = tl.where(mask, value - mean, 0.0)
            squares = tl.sum(value * value, axis=0)
            variance = tl.sum(tl.where(same, squares[:, None], 0.0), axis=0)[None, :] / count
            value = value * (tl.rsqrt(variance + eps) * gain) + shift
            if SILU:
                value *= tl.sigmoid(value)
            _emit(
                value, factor_ptr, grid_ptr, state_ptr, q_ptr, image, pixel, channel, mask,
                C, PIXELS, WIDTH, UPSAMPLE, Q_CHANNELS, HAS_FACTOR, QUANTIZE, MODULATED, LOW, HIGH,
            )  # fmt: skip
        else:
            partial = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            partial_squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for start in range(0, PIXELS, BLOCK_P):
                pixel = start + tl.arange(0, BLOCK_P)[:, None]
                mask = inside & (pixel < PIXELS)
                value = _source(
                    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
                    C1, C2, PIXELS, HAS_B, False, HAS_TIME,
                )  # fmt: skip
                partial += value
                partial_squares += value * value
            sums = tl.sum(partial, axis=0)
            squares = tl.sum(partial_squares, axis=0)
            mean = tl.sum(tl.where(same, sums[:, None], 0.0), axis=0)[None, :] / count
            power = tl.sum(tl.where(same, squares[:, None], 0.0), axis=0)[None, :] / count
            factor = tl.rsqrt(tl.maximum(power - mean * mean, 0.0) + eps) * gain
            for start in range(0, PIXELS, BLOCK_P):
                pixel = start + tl.arange(0, BLOCK_P)[:, None]
                mask = inside & (pixel < PIXELS)
                value = _source(
                    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, image, pixel, channel, mask,
                    C1, C2, PIXELS, HAS_B, WRITE_SUM, HAS_TIME,
                )  # fmt: skip
                value = (value - mean) * factor + shift
                if SILU:
                    value *= tl.sigmoid(value)
                _emit(
                    value, factor_ptr, grid_ptr, state_ptr, q_ptr, image, pixel, channel, mask,
                    C, PIXELS, WIDTH, UPSAMPLE, Q_CHANNELS, HAS_FACTOR, QUANTIZE, MODULATED, LOW, HIGH,
                )  # fmt: skip


def tiling(shape: InputShape, groups: int) -> tuple[int, int, int]:
    """(channels of a program, pixels at a time, warps); with normalization (groups > 0) whole groups, of one image."""
    if not groups:
        channels = min(triton.next_power_of_2(shape.total), 128)
        return channels, min(triton.next_power_of_2(shape.pixels), max(1, 4096 // channels)), 8
    per_group = shape.total // groups
    # 64 bytes of float16 in a row are what DRAM and L2 move at full speed.
    count = next(g for g in range(1, groups + 1) if groups % g == 0 and (g * per_group >= WIDTH or g == groups))
    channels = count * per_group
    rows = max(1, TILE // triton.next_power_of_2(channels))
    return channels, min(triton.next_power_of_2(shape.pixels), rows), 8


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
    """Launches the kernel on torch's current stream.

    a, b [N, pixels, channels] and skip [N, pixels, skip_channels] float16 or float32, `total` receives a + b;
    time float32 [C]; factors float32 [C]; grid float32 [>=3] on the device: 1/step, unit, multiple. `out` int8
    [N, out_pixels, >= C] receives the integers, or, of a float type and without `grid`, the layer's input itself. `state` int16
    [N, pixels, C] is updated in place; without it the layer is stateless.
    """
    c, pixels = shape.total, shape.pixels
    top = 2 ** (bits - 1) - 1
    channels, block_p, warps = tiling(shape, norm.groups if norm is not None else 0)
    slices = 1 if norm is not None else triton.cdiv(pixels, block_p)
    launch = (len(a), triton.cdiv(c, channels), slices)
    quantize_kernel[launch](
        a,
        b if b is not None else a,
        skip if skip is not None else a,
        time if time is not None else a,
        total if total is not None else a,
        norm.gain if norm is not None else a,
        norm.shift if norm is not None else a,
        factors if factors is not None else a,
        grid if grid is not None else a,
        state if state is not None else a,
        out,
        norm.eps if norm is not None else 0.0,
        C1=shape.channels,
        C2=shape.skip_channels,
        PIXELS=pixels,
        WIDTH=shape.width,
        Q_CHANNELS=out.shape[2],
        UPSAMPLE=shape.upsample,
        HAS_B=b is not None,
        WRITE_SUM=total is not None,
        HAS_TIME=time is not None,
        NORM=norm is not None,
        SILU=silu,
        PER_GROUP=c // norm.groups if norm is not None else 1,
        HAS_FACTOR=factors is not None,
        QUANTIZE=grid is not None,
        MODULATED=state is not None,
        LOW=float(-top - 1),
        HIGH=float(top),
        CHANNELS=channels,
        BLOCK_C=triton.next_power_of_2(channels),
        BLOCK_P=block_p,
        num_warps=warps,
    )
