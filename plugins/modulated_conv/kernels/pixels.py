"""Triton: the inputs of a transformer block's layers. A layer norm over the channels of each pixel, or GEGLU, then the residual
and its integers, in one launch. See `reference` for what is computed, and `quantize` for the launches of other layers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from modiff_trt.core.grid import grid_ends
from modiff_trt.plugins.modulated_conv.kernels.parts import source
from modiff_trt.plugins.modulated_conv.kernels.quantize import emit

# A program holds about so many values of a layer norm, and of GEGLU pixels by channels.
HELD, GATED_PIXELS, GATED_CHANNELS = 4096, 16, 128


@triton.jit
def pixels_kernel(
    a_ptr, b_ptr, sum_ptr, gain_ptr, shift_ptr, grid_ptr, state_ptr, q_ptr, eps,
    C: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, Q_CHANNELS: tl.constexpr,
    HAS_B: tl.constexpr, GEGLU: tl.constexpr, QUANTIZE: tl.constexpr, MODULATED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr, MOVING: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (j, k, n) covers the k-th BLOCK_P pixels of image n, and of the C channels the j-th BLOCK_C, which for a layer
    norm are all of them. With GEGLU `a_ptr` has 2C channels, the gates behind the values."""
    image = tl.program_id(2).to(tl.int64)
    read: tl.constexpr = 2 * C if GEGLU else C
    a_ptr += image * (PIXELS * read)
    b_ptr += image * (PIXELS * read)
    sum_ptr += image * (PIXELS * read)
    state_ptr += image * (PIXELS * C)
    q_ptr += image * (PIXELS * Q_CHANNELS)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    exists = channel < C
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = exists & (pixel < PIXELS)
    # What the launch before does not write is loaded before that has ended (see `quantize_kernel`).
    if not GEGLU:
        gain = tl.load(gain_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    unit, inverse_step, multiple, phase = 1.0, 1.0, 1.0, 0.0
    if QUANTIZE:
        inverse_step = tl.load(grid_ptr)
        if MOVING:
            phase = tl.load(grid_ptr + 4)
        if MODULATED:
            unit, multiple = tl.load(grid_ptr + 1), tl.load(grid_ptr + 2)
    state = pixel
    if MODULATED:
        state = tl.load(state_ptr + pixel * C + channel, mask=mask, other=0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if GEGLU:
        at = a_ptr + pixel * read + channel
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(at + C, mask=mask, other=0.0).to(tl.float32)
        value *= 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        value = source(a_ptr, b_ptr, a_ptr, sum_ptr, pixel, channel, mask, C, 0, HAS_B, HAS_B)
        mean = tl.sum(value, axis=1)[:, None] / C
        centered = tl.where(mask, value - mean, 0.0)
        variance = tl.sum(centered * centered, axis=1)[:, None] / C
        value = centered * tl.rsqrt(variance + eps) * gain + shift
    emit(
        value, state, inverse_step, unit, multiple, phase, state_ptr, q_ptr, pixel, channel, mask,
        C, WIDTH, WIDTH, False, Q_CHANNELS, QUANTIZE, MODULATED, LOW, HIGH, ZERO, MOVING,
    )  # fmt: skip


def quantize_pixels(
    a: Tensor,
    out: Tensor,
    *,
    b: Tensor | None = None,
    total: Tensor | None = None,
    layer_norm: tuple[Tensor, Tensor, float] | None = None,
    grid: Tensor | None = None,
    bits: int = 8,
    state: Tensor | None = None,
    zero_point: int = 0,
    moving: bool = False,
    overlap: bool = False,
) -> None:
    """Launches the kernel on torch's current stream.

    With `layer_norm` (gain [C], shift [C], epsilon) a and b are [N, pixels, C] of a real type, and `total` receives a + b.
    Without it a is [N, pixels, 2C], and the layer's input is GEGLU of it (arXiv 2002.05202). `out`, `grid`, `bits`, `state`,
    `zero_point`, `moving` and `overlap` are as in `quantize_input`.
    """
    gated = layer_norm is None
    n, pixels, c = a.shape
    c = c // 2 if gated else c
    low, high = grid_ends(bits, zero_point)
    if gated:
        block_c, block_p, warps = min(triton.next_power_of_2(c), GATED_CHANNELS), GATED_PIXELS, 4
    else:
        block_c = triton.next_power_of_2(c)
        block_p = max(1, HELD // block_c)
        warps = 4
    gain, shift, eps = layer_norm if layer_norm is not None else (a, a, 0.0)
    pixels_kernel[(triton.cdiv(c, block_c), triton.cdiv(pixels, block_p), n)](
        a,
        b if b is not None else a,
        total if total is not None else a,
        gain,
        shift,
        grid if grid is not None else a,
        state if state is not None else a,
        out,
        eps,
        C=c,
        PIXELS=pixels,
        WIDTH=pixels,
        Q_CHANNELS=out.shape[2],
        HAS_B=b is not None,
        GEGLU=gated,
        QUANTIZE=grid is not None,
        MODULATED=state is not None,
        LOW=float(low),
        HIGH=float(high),
        ZERO=float(zero_point),
        MOVING=moving,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        OVERLAP=overlap,
        num_warps=warps,
        launch_pdl=overlap,
        enable_fp_fusion=True,
    )
