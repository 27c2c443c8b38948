"""Triton: what `o_hat` is computed anew from: the bias, and the two bytes of a state's int16 counts, low + 256 high, as int8
inputs of its convolution. See `runtime.backends.native.refresh`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from modiff_trt.plugins.modulated_conv.kernels.parts import channels_of, store_integers, tile_mask
from modiff_trt.plugins.modulated_conv.kernels.quantize import tiling
from modiff_trt.plugins.modulated_conv.reference import InputShape


@triton.jit
def _elements(C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """(pixels [BLOCK_P, 1], channels [1, BLOCK_C], which of them exist) of program (i, j, n)."""
    channel, exists = channels_of(tl.program_id(0) * BLOCK_C, C, 1, BLOCK_C, 1)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    return pixel, channel, tile_mask(exists, pixel, C, PIXELS, BLOCK_C, BLOCK_P)


@triton.jit
def byte_kernel(
    state_ptr, q_ptr, HIGH: tl.constexpr,
    C: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr,
    OUT_PIXELS: tl.constexpr, Q_CHANNELS: tl.constexpr, UPSAMPLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n): BLOCK_C channels of BLOCK_P pixels of image n's state [PIXELS, C], to q [OUT_PIXELS, Q_CHANNELS]."""
    image = tl.program_id(2).to(tl.int64)
    pixel, channel, mask = _elements(C, PIXELS, BLOCK_C, BLOCK_P)
    # In float32, where it is exact: integers would be narrowed to packed 16-bit additions (`device_code.check_ptx`).
    state = tl.load(state_ptr + image * (PIXELS * C) + pixel * C + channel, mask=mask, other=0).to(tl.float32)
    byte = tl.floor((state + 128.0) * (1 / 256))
    if not HIGH:
        byte = state - byte * 256.0
    q_ptr += image * (OUT_PIXELS * Q_CHANNELS)
    store_integers(q_ptr, byte.to(tl.int8), pixel, channel, mask, WIDTH, PITCH, UPSAMPLE, Q_CHANNELS)


@triton.jit
def bias_kernel(
    out_ptr, bias_ptr, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Program (i, j, n): BLOCK_C channels of BLOCK_P pixels of image n's sums [PIXELS, C]."""
    pixel, channel, mask = _elements(C, PIXELS, BLOCK_C, BLOCK_P)
    at = out_ptr + tl.program_id(2).to(tl.int64) * (PIXELS * C) + pixel * C + channel
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0)
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(tl.abs(value) < float("inf"), bias, value)
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=mask)


def write_byte(shape: InputShape, state: Tensor, q: Tensor, *, high: bool) -> None:
    """One byte of state = low + 256 high, on torch's current stream: int16 [N, pixels, C] to int8 [N, out_pixels, >= C],
    repeated where the input is upsampled. Channels from C on are left alone. No |state| is larger than STATE_MAX."""
    tile = tiling(shape, 0)
    byte_kernel[(triton.cdiv(shape.total, tile.groups), triton.cdiv(shape.pixels, tile.pixels), len(state))](
        state, q, HIGH=high,
        C=shape.total, PIXELS=shape.pixels, WIDTH=shape.width, PITCH=shape.pitch, OUT_PIXELS=shape.out_pixels,
        Q_CHANNELS=q.shape[2], UPSAMPLE=shape.upsample, BLOCK_C=tile.groups, BLOCK_P=tile.pixels, num_warps=tile.warps,
    )  # fmt: skip


def set_to_bias(out: Tensor, bias: Tensor) -> None:
    """out [N, pixels, K] of a real type = bias float32 [K], on torch's current stream. What is not finite stays so."""
    images, pixels, channels = out.shape
    tile = tiling(InputShape(channels, 0, 1, pixels), 0)
    bias_kernel[(triton.cdiv(channels, tile.groups), triton.cdiv(pixels, tile.pixels), images)](
        out, bias, C=channels, PIXELS=pixels, BLOCK_C=tile.groups, BLOCK_P=tile.pixels, num_warps=tile.warps
    )
