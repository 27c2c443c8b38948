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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from modiff_trt.export.grid import grid_max
from modiff_trt.plugins.modulated_conv.reference import STATE_MAX, InputShape

# Images of at most so many pixels are normalized in one launch.
SMALL = 64
# Pixels whose sums one program of the first launch takes, and pixels that one of the second covers.
SLAB, SUM_WARPS = 64, 4
ROWS, WARPS = 32, 4
# 1.5 * 2^23, and its bits: a float32 of small magnitude plus this number is rounded to the nearest integer, half to even,
# which stands in the low bits. Conversion instructions run at a quarter of the rate of additions.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
LIMIT = tl.constexpr(STATE_MAX)


@dataclass(frozen=True)
class Norm:
    """Group normalization: gain and shift float32 [C], the number of groups, epsilon."""

    gain: Tensor
    shift: Tensor
    groups: int
    eps: float


@triton.jit
def _source(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, pixel, channel, mask,
    C1: tl.constexpr, C2: tl.constexpr, HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
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
    if HAS_TIME:
        value += tl.load(time_ptr + channel, mask=channel < C1 + C2, other=0.0)
        value = tl.where(mask, value, 0.0)
    return value


@triton.jit
def _mask(
    exists, pixel, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """[BLOCK_P, BLOCK_C]: which elements of a tile exist; a constant where all do, so that loads need no predicate."""
    if C % BLOCK_C == 0 and PIXELS % BLOCK_P == 0:
        return tl.full([BLOCK_P, BLOCK_C], True, tl.int1)
    return exists & (pixel < PIXELS)


@triton.jit
def _emit(
    value, state, factor_ptr, grid_ptr, state_ptr, q_ptr, pixel, channel, mask,
    C: tl.constexpr, WIDTH: tl.constexpr, UPSAMPLE: tl.constexpr,
    Q_CHANNELS: tl.constexpr, HAS_FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Rounds the residual of `value`, moves the state by it and writes the integers (or `value` itself)."""
    if HAS_FACTOR:
        value *= tl.load(factor_ptr + channel, mask=channel < C, other=0.0)
    if QUANTIZE:
        inverse_step = tl.load(grid_ptr)
        cells = value * inverse_step
        if MODULATED:
            state = state.to(tl.int32)
            cells -= ((state + MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC) * (tl.load(grid_ptr + 1) * inverse_step)
        cells = tl.minimum(tl.maximum(cells, LOW), HIGH) + MAGIC
        integers = cells.to(tl.int32, bitcast=True) - MAGIC_BITS
        narrow = integers.to(tl.int8)
        if MODULATED:
            state += integers * tl.load(grid_ptr + 2).to(tl.int32)
            state = tl.minimum(tl.maximum(state, -LIMIT), LIMIT)
            tl.store(state_ptr + pixel * C + channel, state.to(tl.int16), mask=mask)
    else:
        narrow = value.to(q_ptr.dtype.element_ty)
    if UPSAMPLE:
        corner = (pixel // WIDTH) * (4 * WIDTH) + (pixel % WIDTH) * 2
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                to = corner + down * (2 * WIDTH) + right
                tl.store(q_ptr + to * Q_CHANNELS + channel, narrow, mask=mask)
    else:
        tl.store(q_ptr + pixel * Q_CHANNELS + channel, narrow, mask=mask)


@triton.jit
def _silu(value, FAST: tl.constexpr):
    """x sigmoid(x); FAST with the GPU's approximate exponential and reciprocal (2^-22 relative)."""
    if FAST:
        beyond = 1.0 + tl.math.exp2(value * -1.4426950408889634)
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [beyond], dtype=tl.float32, is_pure=True, pack=1
        )
        return value * inverse
    return value * tl.sigmoid(value)


@triton.jit
def _channels(
    start, C: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """(channel, whether it exists), [1, BLOCK_G * LANES]: BLOCK_G groups from channel `start`, each padded to LANES lanes."""
    lane = tl.arange(0, BLOCK_G * LANES)[None, :]
    if LANES == PER_GROUP:
        channel = start + lane
        return channel, channel < C
    channel = start + (lane // LANES) * PER_GROUP + lane % LANES
    return channel, (lane % LANES < PER_GROUP) & (channel < C)


@triton.jit
def _over_groups(by_channel, BLOCK_G: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_G * LANES] -> sums over each group [BLOCK_G]."""
    return tl.sum(tl.reshape(by_channel, [BLOCK_G, LANES]), axis=1)


@triton.jit
def _to_channels(by_group, BLOCK_G: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_G] -> each group's value on its lanes [1, BLOCK_G * LANES]."""
    return tl.reshape(tl.broadcast_to(by_group[:, None], [BLOCK_G, LANES]), [BLOCK_G * LANES])[None, :]


@triton.jit
def sums_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, partial_ptr,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr,
    HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, SLABS: tl.constexpr,
    BLOCK_G: tl.constexpr, LANES: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (n, j, s): sums and sums of squares of the j-th BLOCK_G groups over the s-th slab of image n.

    OVERLAP lets the launch begin while the one before it ends.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    image = tl.program_id(0).to(tl.int64)
    a_ptr += image * (PIXELS * C1)
    b_ptr += image * (PIXELS * C1)
    sum_ptr += image * (PIXELS * C1)
    skip_ptr += image * (PIXELS * C2)
    slab = tl.program_id(2)
    channel, exists = _channels(tl.program_id(1) * (BLOCK_G * PER_GROUP), C1 + C2, PER_GROUP, BLOCK_G, LANES)
    pixel = slab * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = _mask(exists, pixel, (C1 + C2) if LANES == PER_GROUP else 1, PIXELS, BLOCK_G * LANES, BLOCK_P)
    if HAS_TIME:
        time = tl.load(time_ptr + channel, mask=exists, other=0.0)
    value = _source(
        a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, pixel, channel, mask, C1, C2, HAS_B, WRITE_SUM, False,
    )  # fmt: skip
    if HAS_TIME:
        value = tl.where(mask, value + time, 0.0)
    # First over a group's channels, which one thread or its neighbours hold, then over pixels: other warps have those, and
    # what goes from warp to warp through shared memory is what this kernel would wait for.
    by_group = tl.reshape(value, [BLOCK_P, BLOCK_G, LANES])
    sums = tl.sum(tl.sum(by_group, axis=2), axis=0)
    squares = tl.sum(tl.sum(by_group * by_group, axis=2), axis=0)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    at = partial_ptr + (image * SLABS + slab) * (2 * GROUPS) + group
    tl.store(at, sums, mask=group < GROUPS)
    tl.store(at + GROUPS, squares, mask=group < GROUPS)


@triton.jit
def quantize_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, partial_ptr, gain_ptr, shift_ptr, factor_ptr, grid_ptr, state_ptr, q_ptr, eps,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, Q_CHANNELS: tl.constexpr,
    UPSAMPLE: tl.constexpr, HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    SLABS: tl.constexpr, BLOCK_S: tl.constexpr, HAS_FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_G: tl.constexpr, LANES: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (n, j, k) covers the j-th BLOCK_G groups of channels (without NORM, simply channels) and the k-th BLOCK_P
    pixels of image n.

    NORM is 0 (none), 1 (the groups' sums are in `partial_ptr`) or 2 (the program has all pixels and sums them itself).
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    C: tl.constexpr = C1 + C2
    image = tl.program_id(0).to(tl.int64)
    a_ptr += image * (PIXELS * C1)
    b_ptr += image * (PIXELS * C1)
    sum_ptr += image * (PIXELS * C1)
    skip_ptr += image * (PIXELS * C2)
    state_ptr += image * (PIXELS * C)
    q_ptr += image * (PIXELS * Q_CHANNELS * (4 if UPSAMPLE else 1))
    channel, exists = _channels(tl.program_id(1) * (BLOCK_G * PER_GROUP), C, PER_GROUP, BLOCK_G, LANES)
    pixel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = _mask(exists, pixel, C if LANES == PER_GROUP else 1, PIXELS, BLOCK_G * LANES, BLOCK_P)
    state = pixel
    if MODULATED:
        state = tl.load(state_ptr + pixel * C + channel, mask=mask, other=0)
    # With sums from the first launch the time bias is part of the offset of each channel.
    value = _source(
        a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, pixel, channel, mask, C1, C2, HAS_B, WRITE_SUM, HAS_TIME and NORM != 1,
    )  # fmt: skip
    if NORM > 0:
        count = PIXELS * PER_GROUP
        if NORM == 1:
            slab = tl.arange(0, BLOCK_S)[:, None]
            group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
            at = partial_ptr + (image * SLABS + slab) * (2 * GROUPS) + group
            known = (slab < SLABS) & (group < GROUPS)
            mean = tl.sum(tl.load(at, mask=known, other=0.0), axis=0) / count
            power = tl.sum(tl.load(at + GROUPS, mask=known, other=0.0), axis=0) / count
            variance = tl.maximum(power - mean * mean, 0.0)
        else:
            mean = _over_groups(tl.sum(value, axis=0), BLOCK_G, LANES) / count
            centered = tl.where(mask, value - _to_channels(mean, BLOCK_G, LANES), 0.0)
            variance = _over_groups(tl.sum(centered * centered, axis=0), BLOCK_G, LANES) / count
        factor = _to_channels(tl.rsqrt(variance + eps), BLOCK_G, LANES)
        factor *= tl.load(gain_ptr + channel, mask=exists, other=0.0)
        center = _to_channels(mean, BLOCK_G, LANES)
        if HAS_TIME and NORM == 1:
            center -= tl.load(time_ptr + channel, mask=exists, other=0.0)
        value = value * factor + (tl.load(shift_ptr + channel, mask=exists, other=0.0) - center * factor)
    if SILU:
        value = _silu(value, FAST)
    _emit(
        value, state, factor_ptr, grid_ptr, state_ptr, q_ptr, pixel, channel, mask,
        C, WIDTH, UPSAMPLE, Q_CHANNELS, HAS_FACTOR, QUANTIZE, MODULATED, LOW, HIGH,
    )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """A program's tile: `groups` of `lanes` channels by `pixels`, run by `warps`."""

    groups: int
    lanes: int
    pixels: int
    warps: int


def tiling(shape: InputShape, groups: int) -> Tiling:
    """The tile of the quantizing launch; `groups` 0 is no normalization."""
    if not groups:
        lanes = min(triton.next_power_of_2(shape.total), 128)
        return Tiling(lanes, 1, min(triton.next_power_of_2(shape.pixels), max(1, 2048 // lanes)), 8)
    lanes = triton.next_power_of_2(shape.total // groups)
    if shape.pixels <= SMALL:
        return Tiling(max(1, 32 // lanes), lanes, triton.next_power_of_2(shape.pixels), 4)
    return Tiling(max(1, 128 // lanes), lanes, ROWS, WARPS)


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
    overlap: bool = False,
) -> None:
    """Launches the kernels on torch's current stream.

    a, b [N, pixels, channels] and skip [N, pixels, skip_channels] float16 or float32, `total` receives a + b;
    time float32 [C]; factors float32 [C]; grid float32 [>=3] on the device: 1/step, unit, multiple. `out` int8
    [N, out_pixels, >= C] receives the integers, or, of a float type and without `grid`, the layer's input itself. `state` int16
    [N, pixels, C] is updated in place; without it the layer is stateless. `overlap` (compute
    capability 9.0 and later) lets launches begin while the one before ends.
    """
    c, pixels = shape.total, shape.pixels
    top = grid_max(bits)
    groups = norm.groups if norm is not None else 0
    per_group = c // groups if groups else 1
    tile = tiling(shape, groups)
    columns = triton.cdiv(c, tile.groups * per_group)
    slabs = triton.cdiv(pixels, SLAB)
    two_launches = groups > 0 and pixels > SMALL
    common = {
        "C1": shape.channels,
        "C2": shape.skip_channels,
        "PIXELS": pixels,
        "PER_GROUP": per_group,
        "GROUPS": groups,
        "SLABS": slabs,
        "BLOCK_G": tile.groups,
        "LANES": tile.lanes,
        "OVERLAP": overlap,
        "launch_pdl": overlap,
        "enable_fp_fusion": True,
    }
    partial = a
    if two_launches:
        partial = torch.empty(len(a), slabs, 2, groups, device=a.device)
        sums_kernel[(len(a), columns, slabs)](
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
            num_warps=SUM_WARPS,
            **common,
        )
        if total is not None:
            a, b, total = total, None, None
    quantize_kernel[(len(a), columns, triton.cdiv(pixels, tile.pixels))](
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
        FAST=a.is_cuda,
        BLOCK_S=triton.next_power_of_2(slabs),
        HAS_FACTOR=factors is not None,
        QUANTIZE=grid is not None,
        MODULATED=state is not None,
        LOW=float(-top - 1),
        HIGH=float(top),
        BLOCK_P=tile.pixels,
        num_warps=tile.warps,
        **common,
    )
