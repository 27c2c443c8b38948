"""Triton: from a layer's sources to its int8 input, with `a_hat` updated in place. See `reference` for what is computed.

Small images take one launch, in which a program holds whole normalization groups of one image. Larger ones take two: the
first sums the groups (and writes a pending residual sum), the second does everything else in one pass. Where there are many
sums to add up, a launch between them makes each channel's factor and offset of them. Tilings do not depend on the batch, so
that the batch cannot change an image.

What the launch just before does not write is loaded before `gdc_wait`, while that launch still runs: for one image, launches
do little but wait for memory. It is safe because nothing that is loaded so early is written by launches that may still run:
parameters never change, a layer's state was last written in the pass before, and the row vector of a pass is complete before
its first such launch (`GraphedDenoiser._pass`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from modiff_trt.core.grid import SMALLEST_SCALE, grid_ends
from modiff_trt.core.state_grid import STATE_MAX
from modiff_trt.plugins.modulated_conv.geometry import SMALL
from modiff_trt.plugins.modulated_conv.kernels.groups import (
    MOST_SUMS,
    SLAB,
    SLABS_AT_A_TIME,
    Norm,
    Tiling,
    affine_of,
    moments,
    sum_groups,
)
from modiff_trt.plugins.modulated_conv.kernels.parts import (
    MAGIC,
    channels_of,
    integer_of,
    over_groups,
    shift_of,
    shifted,
    silu_of,
    source,
    store_integers,
    tile_mask,
    to_channels,
)
from modiff_trt.plugins.modulated_conv.reference import InputShape

# Pixels that a program of the second launch covers.
ROWS, WARPS = 32, 4
LIMIT = tl.constexpr(STATE_MAX)
# The least step of a grid that follows its image.
TINY = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _dynamic_grid(peak_ptr, step_ptr, unit, image, MODULATED: tl.constexpr, HIGH: tl.constexpr):
    """(1/step, multiple) of a grid that spans an image's largest magnitude; the step is written for the convolution. Where
    there is state the step is the next whole number of units."""
    peak = tl.load(peak_ptr + image).to(tl.float32, bitcast=True)
    multiple = 1.0
    step = tl.maximum(peak / HIGH, TINY)
    if MODULATED:
        multiple = tl.maximum(tl.ceil(step / unit), 1.0)
        step = multiple * unit
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(step_ptr + image, step)
    return 1.0 / step, multiple


@triton.jit
def emit(
    value, state, inverse_step, unit, multiple, phase, state_ptr, q_ptr, pixel, channel, mask,
    C: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr, UPSAMPLE: tl.constexpr, Q_CHANNELS: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr,
    MOVING: tl.constexpr,
):  # fmt: skip
    """Rounds the residual of `value`, moves the state by it and writes the integers (or `value` itself). LOW and HIGH are the
    grid's ends as seen from its zero point ZERO, which is 0 where there is state. A MOVING grid has none."""
    if QUANTIZE:
        cells = value * inverse_step
        if MOVING:
            cells += shift_of(channel, phase)
        if MODULATED:
            counts, cell = shifted(state), unit * inverse_step
            # Clipped here, and not the state below: o_hat would go on without it (`reference.reachable`).
            reach = tl.maximum(LIMIT * cell - 0.5, 0.0)
            cells = tl.minimum(tl.maximum(cells, -reach), reach) - (counts - MAGIC) * cell
        cells = tl.minimum(tl.maximum(cells, LOW), HIGH) + (MAGIC + ZERO)
        narrow = integer_of(cells).to(tl.int8)
        if MODULATED:
            # In float32, where it is exact: integers would be narrowed to packed 16-bit additions (`device_code.check_ptx`).
            counts += (cells - MAGIC) * multiple
            tl.store(state_ptr + pixel * C + channel, integer_of(counts).to(tl.int16), mask=mask)
    else:
        narrow = value.to(q_ptr.dtype.element_ty)
    store_integers(q_ptr, narrow, pixel, channel, mask, WIDTH, PITCH, UPSAMPLE, Q_CHANNELS)


@triton.jit
def quantize_kernel(
    a_ptr, b_ptr, skip_ptr, time_ptr, sum_ptr, partial_ptr, gain_ptr, shift_ptr, factor_ptr, grid_ptr, state_ptr, q_ptr,
    peak_ptr, step_ptr, eps,
    C1: tl.constexpr, C2: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr,
    OUT_PIXELS: tl.constexpr, OUT_START: tl.constexpr, Q_CHANNELS: tl.constexpr,
    UPSAMPLE: tl.constexpr, HAS_B: tl.constexpr, WRITE_SUM: tl.constexpr, HAS_TIME: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, PER_GROUP: tl.constexpr,
    SLABS: tl.constexpr, BLOCK_S: tl.constexpr, HAS_FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr, MODULATED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr,
    MOVING: tl.constexpr, PEAK: tl.constexpr,
    BLOCK_G: tl.constexpr, LANES: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (j, k, n) covers the k-th BLOCK_P pixels of image n, and the j-th BLOCK_G parts of groups (NORM 1 and 3), groups
    of channels (2) or channels (0), of LANES lanes each.

    NORM is 0 (none), 1 (sums are in `partial_ptr`), 2 (the program has all pixels and sums them itself) or 3 (factors and
    offsets are in `partial_ptr`). PEAK is
    0 (the grid is given), 1 (only the bits of each image's largest |residual| are put into int32 `peak_ptr`, which is zero
    before) or 2 (the grid follows from them).
    """
    C: tl.constexpr = C1 + C2
    image = tl.program_id(2).to(tl.int64)
    a_ptr += image * (PIXELS * C1)
    b_ptr += image * (PIXELS * C1)
    sum_ptr += image * (PIXELS * C1)
    skip_ptr += image * (PIXELS * C2)
    state_ptr += image * (PIXELS * C)
    q_ptr += image * (OUT_PIXELS * Q_CHANNELS) + OUT_START * Q_CHANNELS
    filled: tl.constexpr = PER_GROUP if NORM == 2 else LANES
    channel, exists = channels_of(tl.program_id(0) * (BLOCK_G * filled), C, filled, BLOCK_G, LANES)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = tile_mask(exists, pixel, C if filled == LANES else 1, PIXELS, BLOCK_G * LANES, BLOCK_P)
    # Vectors of channels before tiles: the first load decides the layout of all, and theirs are the cheaper ones to move.
    if HAS_TIME and NORM != 3:
        time = tl.load(time_ptr + channel, mask=exists, other=0.0)
    if NORM == 1 or NORM == 2:
        gain = tl.load(gain_ptr + channel, mask=exists, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=exists, other=0.0)
    if HAS_FACTOR:
        factors = tl.load(factor_ptr + channel, mask=exists, other=0.0)
    unit, inverse_step, multiple, phase = 1.0, 1.0, 1.0, 0.0
    if MODULATED:
        unit = tl.load(grid_ptr + 1)
    if MOVING:
        phase = tl.load(grid_ptr + 4)
    if QUANTIZE and PEAK == 0:
        inverse_step = tl.load(grid_ptr)
        if MODULATED:
            multiple = tl.load(grid_ptr + 2)
    state = pixel
    if MODULATED:
        state = tl.load(state_ptr + pixel * C + channel, mask=mask, other=0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    value = source(a_ptr, b_ptr, skip_ptr, sum_ptr, pixel, channel, mask, C1, C2, HAS_B, WRITE_SUM)
    # With sums from the first launch the time bias is part of the offset of each channel.
    if HAS_TIME and (NORM == 0 or NORM == 2):
        value = tl.where(mask, value + time, 0.0)
    if NORM == 3:
        affine_ptr = partial_ptr + image * (2 * C) + channel
        value = value * tl.load(affine_ptr, mask=exists, other=0.0) + tl.load(affine_ptr + C, mask=exists, other=0.0)
    if NORM == 1 or NORM == 2:
        count = PIXELS * PER_GROUP
        if NORM == 1:
            sums = partial_ptr + image * (SLABS * 2 * (C // LANES))
            mean, variance = moments(sums, count, C // LANES, PER_GROUP // LANES, SLABS, BLOCK_S, BLOCK_G)
        else:
            mean = over_groups(value, BLOCK_P, BLOCK_G, LANES) / count
            centered = tl.where(mask, value - to_channels(mean, BLOCK_G, LANES), 0.0)
            variance = over_groups(centered * centered, BLOCK_P, BLOCK_G, LANES) / count
        factor = to_channels(tl.rsqrt(variance + eps), BLOCK_G, LANES)
        factor *= gain
        center = to_channels(mean, BLOCK_G, LANES)
        if HAS_TIME and NORM == 1:
            center -= time
        value = value * factor + (shift - center * factor)
    if SILU:
        value = silu_of(value, FAST)
    if HAS_FACTOR:
        value *= factors
    if PEAK == 1:
        if MODULATED:
            # Of what the state can follow: the grid of the others would stay coarse for one that it cannot.
            value = tl.minimum(tl.maximum(value, -LIMIT * unit), LIMIT * unit) - (shifted(state) - MAGIC) * unit
        largest = tl.max(tl.where(mask, tl.abs(value), 0.0))
        # Floats that are not negative are ordered like their bits.
        tl.atomic_max(peak_ptr + image, largest.to(tl.int32, bitcast=True), sem="relaxed")
    else:
        if PEAK == 2:
            inverse_step, multiple = _dynamic_grid(peak_ptr, step_ptr, unit, image, MODULATED, HIGH)
        emit(
            value, state, inverse_step, unit, multiple, phase, state_ptr, q_ptr, pixel, channel, mask,
            C, WIDTH, PITCH, UPSAMPLE, Q_CHANNELS, QUANTIZE, MODULATED, LOW, HIGH, ZERO, MOVING,
        )  # fmt: skip


def tiling(shape: InputShape, groups: int) -> Tiling:
    """The tile of the quantizing launch (that of the sums has its channels too); `groups` 0 is no normalization."""
    if not groups:
        lanes = min(triton.next_power_of_2(shape.total), 128)
        return Tiling(lanes, 1, min(triton.next_power_of_2(shape.pixels), max(1, 2048 // lanes)), 8)
    per_group = shape.total // groups
    if shape.pixels <= SMALL:
        lanes = triton.next_power_of_2(per_group)
        return Tiling(max(1, 32 // lanes), lanes, triton.next_power_of_2(shape.pixels), 4)
    # Groups of 12 channels are three parts of 4, so that neighbouring lanes hold neighbouring channels.
    lanes = min(per_group & -per_group, 128)
    return Tiling(128 // lanes, lanes, ROWS, WARPS)


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
    steps: Tensor | None = None,
    zero_point: int = 0,
    moving: bool = False,
    overlap: bool = False,
) -> None:
    """Launches the kernels on torch's current stream.

    a, b [N, pixels, channels] and skip [N, pixels, skip_channels] float16 or float32, `total` receives a + b;
    time float32 [C]; factors float32 [C]; grid float32 [>=5] on the device: 1/step, unit, multiple, step, phase. `out` int8
    [N, out_pixels, >= C] receives the integers, or, of a float type and without `grid`, the layer's input itself; its frame and
    its channels from C on are left alone. `state` int16 [N, pixels, C] is updated in place; without it the layer is stateless,
    and its grid may have a `zero_point` and be `moving`. With `steps` float32 [N] the grid follows each image
    (LTQ): it spans the largest |residual|, `grid` gives the unit only, and `steps` receives the steps. `overlap` (compute
    capability 9.0 and later) lets launches begin while the one before ends, which of all these may write a, b and skip then.
    """
    c, pixels = shape.total, shape.pixels
    low, high = grid_ends(bits, zero_point)
    groups = norm.groups if norm is not None else 0
    per_group = c // groups if groups else 1
    tile = tiling(shape, groups)
    slabs = triton.cdiv(pixels, SLAB)
    two_launches = groups > 0 and pixels > SMALL
    columns = triton.cdiv(c, tile.groups * (tile.lanes if two_launches else per_group))
    common = {
        "C1": shape.channels,
        "C2": shape.skip_channels,
        "PIXELS": pixels,
        "SLABS": slabs,
        "BLOCK_G": tile.groups,
        "LANES": tile.lanes,
        "OVERLAP": overlap,
        "launch_pdl": overlap,
        "enable_fp_fusion": True,
    }
    partial, block_s, affine = a, 1, False
    if two_launches:
        assert norm is not None
        partial = sum_groups(shape, a, b=b, skip=skip, time=time, total=total, tile=tile, overlap=overlap)
        if total is not None:
            a, b, total = total, None, None
        block_s = min(triton.next_power_of_2(slabs), SLABS_AT_A_TIME)
        affine = slabs * (per_group // tile.lanes) > MOST_SUMS
        if affine:
            partial = affine_of(partial, norm, time=time, pixels=pixels, tile=tile, overlap=overlap)
    peaks = torch.zeros(len(a), dtype=torch.int32, device=a.device) if steps is not None else None
    for peak in (0,) if peaks is None else (1, 2):
        quantize_kernel[(columns, triton.cdiv(pixels, tile.pixels), len(a))](
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
            peaks if peaks is not None else a,
            steps if steps is not None else a,
            norm.eps if norm is not None else 0.0,
            WIDTH=shape.width,
            PITCH=shape.pitch,
            OUT_PIXELS=shape.out_pixels,
            OUT_START=shape.frame[0] * shape.pitch + shape.frame[1],
            Q_CHANNELS=out.shape[2],
            UPSAMPLE=shape.upsample,
            HAS_B=b is not None,
            WRITE_SUM=total is not None,
            HAS_TIME=time is not None,
            NORM=0 if norm is None else (3 if affine else 1 if two_launches else 2),
            SILU=silu,
            FAST=a.is_cuda,
            PER_GROUP=per_group,
            BLOCK_S=block_s,
            HAS_FACTOR=factors is not None,
            QUANTIZE=grid is not None,
            MODULATED=state is not None,
            LOW=float(low),
            HIGH=float(high),
            ZERO=float(zero_point),
            MOVING=moving,
            PEAK=peak,
            BLOCK_P=tile.pixels,
            num_warps=tile.warps,
            **common,
        )
