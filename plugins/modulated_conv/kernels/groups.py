"""Triton: the sums of normalization groups over large images, and what follows of them for each channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from modiff_trt.plugins.modulated_conv.kernels.parts import channels_of, over_groups, source, tile_mask, to_channels
from modiff_trt.plugins.modulated_conv.reference import InputShape

# Pixels whose sums one program takes.
SLAB, SUM_WARPS = 128, 8
# Of so many slabs a program adds up the sums at a time.
SLABS_AT_A_TIME = 16
# With more sums than these to a group, every program of the quantizing launch would spend its time on them.
MOST_SUMS, AFFINE_PARTS = 32, 16


@dataclass(frozen=True)
class Norm:
    """Group normalization: gain and shift float32 [C], the number of groups, epsilon."""

    gain: Tensor
    shift: Tensor
    groups: int
    eps: float


@dataclass(frozen=True)
class Tiling:
    """A program's tile: `groups` (in two launches: parts of groups) of `lanes` channels by `pixels`, run by `warps`."""

    groups: int
    lanes: int
    pixels: int
    warps: int


@triton.jit
def sums_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, partial_ptr,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr,
    HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr, SLABS: tl.constexpr,
    BLOCK_G: tl.constexpr, LANES: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (j, s, n): sums and sums of squares over the s-th slab of the n-th image from the end, of the j-th BLOCK_G times
    LANES channels, each LANES of which are a part of a group: partial [N, SLABS, 2, C / LANES].

    OVERLAP lets the launch begin while the one before it ends.
    """
    # From the end: what the launch before wrote last is still in the cache, and then so is what the next launch reads first.
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    a_ptr += image * (PIXELS * C1)
    b_ptr += image * (PIXELS * C1)
    sum_ptr += image * (PIXELS * C1)
    skip_ptr += image * (PIXELS * C2)
    slab = tl.program_id(1)
    C: tl.constexpr = C1 + C2
    channel, exists = channels_of(tl.program_id(0) * (BLOCK_G * LANES), C, LANES, BLOCK_G, LANES)
    pixel = slab * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = tile_mask(exists, pixel, C, PIXELS, BLOCK_G * LANES, BLOCK_P)
    if HAS_TIME:
        time = tl.load(time_ptr + channel, mask=exists, other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    value = source(a_ptr, b_ptr, skip_ptr, sum_ptr, pixel, channel, mask, C1, C2, HAS_B, WRITE_SUM)
    if HAS_TIME:
        value = tl.where(mask, value + time, 0.0)
    sums = over_groups(value, BLOCK_P, BLOCK_G, LANES)
    squares = over_groups(value * value, BLOCK_P, BLOCK_G, LANES)
    parts: tl.constexpr = C // LANES
    part = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    at = partial_ptr + (image * SLABS + slab) * (2 * parts) + part
    tl.store(at, sums, mask=part < parts)
    tl.store(at + parts, squares, mask=part < parts)


@triton.jit
def moments(
    partial_ptr, count, PARTS: tl.constexpr, IN_GROUP: tl.constexpr, SLABS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """(mean, variance) [BLOCK_G]: for each of this program's parts those of its whole group of IN_GROUP parts, from an image's
    sums [SLABS, 2, PARTS]."""
    part = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    mean = tl.zeros([BLOCK_G], tl.float32)
    power = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, SLABS, BLOCK_S):
        slab = first + tl.arange(0, BLOCK_S)[:, None]
        known = (slab < SLABS) & (part < PARTS)
        at = partial_ptr + slab * (2 * PARTS) + part // IN_GROUP * IN_GROUP
        for i in tl.static_range(IN_GROUP):
            mean += tl.sum(tl.load(at + i, mask=known, other=0.0), axis=0)
            power += tl.sum(tl.load(at + PARTS + i, mask=known, other=0.0), axis=0)
    mean /= count
    return mean, tl.maximum(power / count - mean * mean, 0.0)


@triton.jit
def affine_kernel(
    partial_ptr, time_ptr, gain_ptr, shift_ptr, affine_ptr, count, eps,
    C: tl.constexpr, HAS_TIME: tl.constexpr, PER_GROUP: tl.constexpr, SLABS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (j, n): of the j-th BLOCK_G parts of groups of image n, each channel's factor and offset: affine [N, 2, C]."""
    image = tl.program_id(1).to(tl.int64)
    channel, exists = channels_of(tl.program_id(0) * (BLOCK_G * LANES), C, LANES, BLOCK_G, LANES)
    gain = tl.load(gain_ptr + channel, mask=exists, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=exists, other=0.0)
    if HAS_TIME:
        time = tl.load(time_ptr + channel, mask=exists, other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sums = partial_ptr + image * (SLABS * 2 * (C // LANES))
    mean, variance = moments(sums, count, C // LANES, PER_GROUP // LANES, SLABS, BLOCK_S, BLOCK_G)
    factor = to_channels(tl.rsqrt(variance + eps), BLOCK_G, LANES) * gain
    center = to_channels(mean, BLOCK_G, LANES)
    if HAS_TIME:
        center -= time
    tl.store(affine_ptr + image * (2 * C) + channel, factor, mask=exists)
    tl.store(affine_ptr + image * (2 * C) + C + channel, shift - center * factor, mask=exists)


def sum_groups(
    shape: InputShape,
    a: Tensor,
    *,
    b: Tensor | None,
    skip: Tensor | None,
    time: Tensor | None,
    total: Tensor | None,
    tile: Tiling,
    overlap: bool,
) -> Tensor:
    """Launches `sums_kernel` on the sources of `quantize_input`: float32 [N, slabs, 2, C / lanes]."""
    slabs, c = triton.cdiv(shape.pixels, SLAB), shape.total
    partial = torch.empty(len(a), slabs, 2, c // tile.lanes, device=a.device)
    sums_kernel[(triton.cdiv(c, tile.groups * tile.lanes), slabs, len(a))](
        a,
        b if b is not None else a,
        skip if skip is not None else a,
        time if time is not None else a,
        total if total is not None else a,
        partial,
        C1=shape.channels,
        C2=shape.skip_channels,
        PIXELS=shape.pixels,
        HAS_B=b is not None,
        WRITE_SUM=total is not None,
        HAS_TIME=time is not None,
        SLABS=slabs,
        BLOCK_G=tile.groups,
        LANES=tile.lanes,
        BLOCK_P=SLAB,
        OVERLAP=overlap,
        num_warps=SUM_WARPS,
        launch_pdl=overlap,
        enable_fp_fusion=True,
    )
    return partial


def affine_of(sums: Tensor, norm: Norm, *, time: Tensor | None, pixels: int, tile: Tiling, overlap: bool) -> Tensor:
    """Launches `affine_kernel` on what `sum_groups` gave: each channel's factor and offset, float32 [N, 2, C]."""
    n, slabs, _, parts = sums.shape
    c = parts * tile.lanes
    per_group = c // norm.groups
    affine = torch.empty(n, 2, c, device=sums.device)
    affine_kernel[(triton.cdiv(parts, AFFINE_PARTS), n)](
        sums,
        time if time is not None else sums,
        norm.gain,
        norm.shift,
        affine,
        pixels * per_group,
        norm.eps,
        C=c,
        HAS_TIME=time is not None,
        PER_GROUP=per_group,
        SLABS=slabs,
        BLOCK_S=min(triton.next_power_of_2(slabs), SLABS_AT_A_TIME),
        BLOCK_G=AFFINE_PARTS,
        LANES=tile.lanes,
        OVERLAP=overlap,
        num_warps=tile.warps,
        launch_pdl=overlap,
        enable_fp_fusion=True,
    )
    return affine
