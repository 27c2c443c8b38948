"""Triton: convolutions of layers in float at a network's edges, with few input channels or with few output channels.

A tile of `conv_kernel` would be padding for the most part there. With few input channels all taps and channels of a pixel
are one sum of `DEPTH`. With few output channels each pixel is read once, and not once for each tap: a product makes what it
gives to each tap and output channel, and a second launch adds these planes up. Tiles do not depend on the batch, so that it
cannot change an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from modiff_trt.plugins.modulated_conv.geometry import Geometry

# Of taps times channels at an edge; tensor cores take at least 16.
LEAST = 16
INPUT_SITES, INPUT_WARPS = 64, 4
PLANE_SITES, PLANE_DEPTH, PLANE_STAGES, PLANE_WARPS = 128, 64, 3, 4
SUM_SITES, SUM_WARPS = 256, 8


@triton.jit
def few_inputs_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, sites,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (i, j): BLOCK_M of the `sites` = N*P*Q output pixels by BLOCK_N of the K output channels.

    x [N, H*W, C] of any real type, weight [K, R, R, C], bias float32 [K], out [N, P*Q, K]; DEPTH is at least R*R*C.
    """
    # Unsigned divisions, as in `conv_kernel`.
    site = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    where = site.to(tl.uint32)
    inner = where % (P * Q)
    image = (where // (P * Q)).to(tl.int32)
    row, column = (inner // Q).to(tl.int32) * STRIDE - TOP, (inner % Q).to(tl.int32) * STRIDE - LEFT
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, DEPTH)
    tap = lane.to(tl.uint32) // C
    down, right = (tap // R).to(tl.int32), (tap % R).to(tl.int32)
    channel = lane - tap.to(tl.int32) * C
    used = lane < R * R * C
    weight = tl.load(weight_ptr + k[:, None] * (R * R * C) + lane[None, :], mask=(k < K)[:, None] & used[None, :], other=0.0)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    y, x = row[:, None] + down[None, :], column[:, None] + right[None, :]
    inside = (site < sites)[:, None] & used[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = (image[:, None] * (H * W) + y * W + x) * C + channel[None, :]
    values = tl.load(x_ptr + at, mask=inside, other=0.0).to(weight.dtype)
    sums = tl.dot(values, tl.trans(weight), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) + bias[None, :]
    known = (site < sites)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + site[:, None] * K + k[None, :], sums.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def planes_kernel(
    x_ptr, weight_ptr, plane_ptr, sites,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (i): what BLOCK_M of the `sites` input pixels give to each tap and output channel, float32 [TAPS * K, sites].

    x [sites, C] and weight [K, TAPS, C] of one real type; PLANES is at least TAPS * K.
    """
    site = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.arange(0, PLANES)
    lanes = tl.arange(0, BLOCK_K)
    tap = plane.to(tl.uint32) // K
    place = ((plane - tap.to(tl.int32) * K) * TAPS + tap.to(tl.int32)) * C
    exists = (plane < TAPS * K)[:, None]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros([PLANES, BLOCK_M], tl.float32)
    for c in tl.range(0, C, BLOCK_K, num_stages=STAGES):
        within = (c + lanes < C)[None, :]
        weight = tl.load(weight_ptr + place[:, None] + (c + lanes)[None, :], mask=exists & within, other=0.0)
        values = tl.load(x_ptr + site[:, None] * C + (c + lanes)[None, :], mask=(site < sites)[:, None] & within, other=0.0)
        sums = tl.dot(weight, tl.trans(values), sums)
    at = plane_ptr + plane[:, None].to(tl.int64) * sites + site[None, :]
    tl.store(at, sums, mask=exists & (site < sites)[None, :])


@triton.jit
def sum_planes_kernel(
    plane_ptr, bias_ptr, out_ptr, sites, pixels,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (i): BLOCK_M of the `sites` = N*P*Q output pixels, from the planes of `pixels` = N*H*W input pixels; bias [K],
    out [N, P*Q, K]; BLOCK_N is at least K."""
    site = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    where = site.to(tl.uint32)
    inner = where % (P * Q)
    image = (where // (P * Q)).to(tl.int32)
    row, column = (inner // Q).to(tl.int32) * STRIDE - TOP, (inner % Q).to(tl.int32) * STRIDE - LEFT
    k = tl.arange(0, BLOCK_N)
    known = (site < sites)[:, None] & (k < K)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    for tap in tl.static_range(R * R):
        y, x = row + tap // R, column + tap % R
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        plane = plane_ptr + (tap * K + k).to(tl.int64)[None, :] * pixels
        sums += tl.load(plane + (image * (H * W) + y * W + x)[:, None], mask=known & inside[:, None], other=0.0)
    tl.store(out_ptr + site[:, None] * K + k[None, :], sums.to(out_ptr.dtype.element_ty), mask=known)


def convolve_few_inputs(
    x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor, geometry: Geometry, overlap: bool = False
) -> None:
    """out = bias[k] + weight * x on torch's current stream; x [N, H*W, C] of any real type, with kernel**2 * C at most
    `geometry.MOST_OF_AN_EDGE`, and the rest as in `conv.convolve_real`."""
    k, sites, columns = geometry.out_channels, geometry.sites, 128 if geometry.out_channels % 128 == 0 else 64
    few_inputs_kernel[(triton.cdiv(sites, INPUT_SITES), triton.cdiv(k, columns))](
        x, weight, bias, out, sites, **geometry.constants | {"C": geometry.channels},
        DEPTH=max(LEAST, triton.next_power_of_2(geometry.kernel**2 * geometry.channels)),
        BLOCK_M=INPUT_SITES, BLOCK_N=columns, OVERLAP=overlap,
        num_warps=INPUT_WARPS, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip


def convolve_few_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor, geometry: Geometry, overlap: bool = False
) -> None:
    """out = bias[k] + weight * x on torch's current stream; weight [K, R, R, C] with kernel**2 * K at most
    `geometry.MOST_OF_AN_EDGE`, and the rest as in `conv.convolve_real`."""
    c, k, taps = geometry.channels, geometry.out_channels, geometry.kernel**2
    constants, pixels = geometry.constants, geometry.batch * geometry.pixels
    del constants["C"]
    planes = torch.empty(taps * k, pixels, device=x.device)
    planes_kernel[(triton.cdiv(pixels, PLANE_SITES),)](
        x, weight, planes, pixels,
        C=c, K=k, TAPS=taps, PLANES=max(LEAST, triton.next_power_of_2(taps * k)),
        BLOCK_M=PLANE_SITES, BLOCK_K=min(PLANE_DEPTH, max(LEAST, triton.next_power_of_2(c))), STAGES=PLANE_STAGES,
        OVERLAP=overlap, num_warps=PLANE_WARPS, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
    sum_planes_kernel[(triton.cdiv(geometry.sites, SUM_SITES),)](
        planes, bias, out, geometry.sites, pixels, **constants,
        BLOCK_M=SUM_SITES, BLOCK_N=triton.next_power_of_2(k), OVERLAP=overlap,
        num_warps=SUM_WARPS, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
