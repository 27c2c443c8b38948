"""Triton: the 1x1 convolutions of layers that stay in float, of many pixels, through tensor descriptors (TMA).

The sums run in the order of `conv_kernel`, so that a layer may take either by the number of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

SITES, CHANNELS, DEPTH, STAGES, WARPS = 128, 128, 64, 2, 4
# Pixels from which its large tiles fill a GPU.
LEAST_SITES = 128 * SITES


@triton.jit
def product_kernel(
    x, skip, weight, bias_ptr, out,
    C: tl.constexpr, C2: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (i): BLOCK_M pixels by BLOCK_N of the K output channels; all channels of some pixels one after the other.

    Descriptors of x [sites, C], skip [sites, C2], weight [K, C + C2] and out [sites, K], of one real type; bias float32 [K].
    """
    columns: tl.constexpr = K // BLOCK_N
    row, column = (tl.program_id(0) // columns) * BLOCK_M, (tl.program_id(0) % columns) * BLOCK_N
    bias = tl.load(bias_ptr + column + tl.arange(0, BLOCK_N))
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, C // BLOCK_K, num_stages=STAGES):
        sums = tl.dot(x.load([row, k * BLOCK_K]), weight.load([column, k * BLOCK_K]).T, sums)
    if C2 > 0:
        for k in tl.range(0, C2 // BLOCK_K, num_stages=STAGES):
            sums = tl.dot(skip.load([row, k * BLOCK_K]), weight.load([column, C + k * BLOCK_K]).T, sums)
    out.store([row, column], (sums + bias[None, :]).to(out.dtype))


def fits_descriptors(sources: Sequence[Tensor], out_channels: int) -> bool:
    """Whether `multiply_real`, whose tiles are made for types of two bytes, can take it, and it is worth it for the pixels."""
    sites = sources[0].shape[0] * sources[0].shape[1]
    divisible = out_channels % CHANNELS == 0 and all(s.shape[2] % DEPTH == 0 for s in sources)
    return sites >= LEAST_SITES and divisible and sources[0].element_size() == 2


def multiply_real(sources: Sequence[Tensor], weight: Tensor, bias: Tensor, out: Tensor, *, overlap: bool = False) -> None:
    """out = bias[k] + weight * x on torch's current stream, x the one or two `sources` [N, L, C_i] side by side; weight [K, C],
    out [N, L, K], all of one real type, contiguous; bias float32 [K]."""
    flat = [s.view(-1, s.shape[2]) for s in sources]
    result = out.view(-1, out.shape[2])
    tile = [SITES, DEPTH]
    product_kernel[(triton.cdiv(len(result), SITES) * (len(weight) // CHANNELS),)](
        TensorDescriptor.from_tensor(flat[0], tile), TensorDescriptor.from_tensor(flat[-1], tile),
        TensorDescriptor.from_tensor(weight, [CHANNELS, DEPTH]), bias, TensorDescriptor.from_tensor(result, [SITES, CHANNELS]),
        C=flat[0].shape[1], C2=flat[1].shape[1] if len(flat) > 1 else 0, K=len(weight),
        BLOCK_M=SITES, BLOCK_N=CHANNELS, BLOCK_K=DEPTH, STAGES=STAGES, OVERLAP=overlap,
        num_warps=WARPS, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
