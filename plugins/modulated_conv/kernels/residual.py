"""Triton: the plugin's first launch. Rounds x - a_hat to the integers of a grid and moves a_hat by them.

Unlike `quantize_kernel` it takes x as the engine hands it over, normalized and activated, in channels-first order, and keeps
a_hat as real numbers of the engine's type, so that the state means the same with the plugin and without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modiff_trt.plugins.modulated_conv.kernels.parts import MAGIC, integer_of


@triton.jit
def residual_kernel(
    x_ptr, a_ptr, a_out_ptr, step_ptr, multiplier_ptr, q_ptr, pixels, channels, padded, low, high,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n): BLOCK_P pixels by BLOCK_C channels of image n.

    x, a_hat and a_hat' (which may be the memory of a_hat) of a real type, [N, channels, pixels]; q int8 [N, pixels, padded],
    zero beyond `channels`. The grid's step is the product of the numbers at step_ptr and multiplier_ptr, and it has the
    integers from `low` to `high`.
    """
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    image = tl.program_id(2).to(tl.int64)
    at = image * channels * pixels + channel * pixels + pixel
    known = (pixel < pixels) & (channel < channels)
    step = tl.load(step_ptr).to(tl.float32) * tl.load(multiplier_ptr).to(tl.float32)
    x = tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=known, other=0.0).to(tl.float32)
    cells = tl.minimum(tl.maximum((x - a) * (1.0 / step), low), high) + MAGIC
    q = integer_of(cells)
    tl.store(a_out_ptr + at, (a + step * q.to(tl.float32)).to(a_out_ptr.dtype.element_ty), mask=known)
    inside = (pixel < pixels) & (channel < padded)
    tl.store(q_ptr + (image * pixels + pixel) * padded + channel, q.to(tl.int8), mask=inside)
