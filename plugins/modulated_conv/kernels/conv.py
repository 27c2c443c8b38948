"""Triton: a convolution as an implicit matrix product; INT8 with scale and accumulation in its epilogue, or FP16.

It serves where cuDNN does not: batches so small that its tiles leave the GPU empty, and TensorRT's plugin, whose tensors may
stand in channels-first order. Integer sums are exact, so no tile size or split changes a bit of the result. Layers that stay
in float come here too: libraries choose another order of summation for another batch, and then a batch would change an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from modiff_trt.plugins.modulated_conv.geometry import (
    MOST_TILES,
    ConvTile,
    Geometry,
    conv_tile,
    has_few_inputs,
    has_few_outputs,
    real_tile,
)
from modiff_trt.plugins.modulated_conv.kernels.edges import convolve_few_inputs, convolve_few_outputs
from modiff_trt.plugins.modulated_conv.kernels.product import fits_descriptors, multiply_real


@triton.jit
def _products(
    sums, x_ptr, weight_ptr, image, row, column, exists, k, part,
    C: tl.constexpr, WEIGHT_C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_M, BLOCK_N] plus the products of one source's C channels; a weight's tap has WEIGHT_C."""
    lanes = tl.arange(0, BLOCK_K)
    blocks: tl.constexpr = C // BLOCK_K
    count: tl.constexpr = R * R * blocks // SPLIT
    first = image * (H * W)
    for i in tl.range(0, count, num_stages=STAGES):
        at = part * count + i
        tap, c = at // blocks, (at % blocks) * BLOCK_K
        y, x = row + tap // R, column + tap % R
        inside = exists & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        values = tl.load(x_ptr + (first + y * W + x)[:, None] * C + (c + lanes)[None, :], mask=inside[:, None], other=0)
        place = (k * (R * R) + tap)[:, None] * WEIGHT_C + (c + lanes)[None, :]
        weight = tl.load(weight_ptr + place, mask=(k < K)[:, None], other=0)
        sums = tl.dot(values, tl.trans(weight), sums, out_dtype=sums.dtype)
    return sums


def _name(specialization) -> str:
    """What profilers call a launch: INT8 and real convolutions are told apart."""
    return "conv_kernel_int8" if specialization.constants["INTEGER"] else "conv_kernel_real"


@triton.jit(repr=_name)
def conv_kernel(
    x_ptr, skip_ptr, weight_ptr, scale_ptr, addend_ptr, out_ptr, step_ptr, multiplier_ptr, partial_ptr, arrived_ptr, sites,
    C: tl.constexpr, C2: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, R: tl.constexpr,
    INTEGER: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j, s): BLOCK_M of the `sites` = N*P*Q output pixels by BLOCK_N of the K output channels, over the s-th of
    SPLIT parts of the sum.

    x [N, H, W, C], int8 with INTEGER or else of a real type, and behind its channels those of skip [N, H, W, C2];
    weight [K, R, R, C + C2] of the same type; out and addend of a real type, [N, P*Q, K] or with CHANNELS_FIRST
    [N, K, P*Q], or with BIAS addend [K]. scale [K] is for INTEGER; with STEP 1 it is multiplied by the numbers at
    step_ptr and multiplier_ptr, with STEP 2 by each image's number at step_ptr [N]. With SPLIT > 1 partial int32 [sites, K]
    and arrived int32 [tiles] are zero, and are left zero: the program that arrives last at a tile writes it. OVERLAP lets the
    launch begin while the one before it ends.
    """
    site = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Unsigned: the compiler narrows signed divisions to packed 16-bit arithmetic, and ptxas (12.8 to 13.0 at least) loses the
    # constant of such an addition when one half of it is used: some pixels then read their neighbour (`device_code.check_ptx`).
    where = site.to(tl.uint32)
    inner = where % (P * Q)
    image, pixel = (where // (P * Q)).to(tl.int32), inner.to(tl.int32)
    row, column = (inner // Q).to(tl.int32) * STRIDE - TOP, (inner % Q).to(tl.int32) * STRIDE - LEFT
    known = (site < sites)[:, None] & (k < K)[None, :]
    start = (image * (K * P * Q))[:, None]
    if CHANNELS_FIRST:
        at = start + k[None, :] * (P * Q) + pixel[:, None]
    else:
        at = start + pixel[:, None] * K + k[None, :]
    # What the launch before does not write is loaded before that has ended (see `quantize_kernel`).
    if BIAS:
        addend = tl.load(addend_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if INTEGER:
        scale = tl.load(scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if STEP == 1:
            scale *= tl.load(step_ptr).to(tl.float32) * tl.load(multiplier_ptr).to(tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    # Of a small tile the addend is fetched while the products are computed; of a large one it would take too many registers.
    early: tl.constexpr = BLOCK_M * BLOCK_N <= 2048 and SPLIT == 1
    if not BIAS and early:
        addend = tl.load(addend_ptr + at, mask=known, other=0.0).to(tl.float32)
    sums = _products(
        sums, x_ptr, weight_ptr, image, row, column, site < sites, k, tl.program_id(2),
        C, C + C2, H, W, K, R, SPLIT, BLOCK_K, STAGES,
    )  # fmt: skip
    if C2 > 0:
        sums = _products(
            sums, skip_ptr, weight_ptr + C, image, row, column, site < sites, k, tl.program_id(2),
            C2, C + C2, H, W, K, R, SPLIT, BLOCK_K, STAGES,
        )  # fmt: skip
    written = known
    if SPLIT > 1:
        place = site[:, None] * K + k[None, :]
        tl.atomic_add(partial_ptr + place, sums, mask=known, sem="relaxed")
        tl.debug_barrier()
        counter = arrived_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        written = (site < tl.where(before == SPLIT - 1, sites, 0))[:, None] & (k < K)[None, :]
        if before == SPLIT - 1:
            sums = tl.load(partial_ptr + place, mask=known, other=0, cache_modifier=".cg")
            tl.debug_barrier()  # zeroes may be written by other threads than those that read
            tl.store(partial_ptr + place, tl.zeros([BLOCK_M, BLOCK_N], tl.int32), mask=known)
            tl.store(counter, 0)
    if not BIAS and not early:
        addend = tl.load(addend_ptr + at, mask=written, other=0.0).to(tl.float32)
    if INTEGER:
        factor = tl.broadcast_to(scale[None, :], [BLOCK_M, BLOCK_N])
        if STEP == 2:
            factor *= tl.load(step_ptr + image, mask=site < sites, other=0.0)[:, None]
        # Rounded once, as in cuDNN's epilogue, whatever layouts the compiler chooses in between.
        result = tl.fma(sums.to(tl.float32), factor, addend)
    else:
        result = addend + sums
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=written)


class Scratch:
    """Zeroed integers for sums in parts, on one device. Launches that may run at the same time need one each."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(0, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
        self._outgrown: list[Tensor] = []

    def for_tile(self, geometry: Geometry, tile: ConvTile) -> tuple[Tensor, Tensor]:
        """(partial sums, arrivals). Allocates only where a launch needs more than every one before it."""
        needed = geometry.sites * geometry.out_channels if tile.split > 1 else 0
        if needed > self._sums.numel():
            self._outgrown.append(self._sums)  # captured graphs go on using it
            self._sums = torch.zeros(needed, dtype=torch.int32, device=self._sums.device)
        return self._sums, self._arrived


def convolve_int8(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    addend: Tensor,
    out: Tensor,
    *,
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    scratch: Scratch,
    steps: Tensor | None = None,
    overlap: bool = False,
    tile: ConvTile | None = None,
) -> None:
    """out = addend + scale[k] (weight * q) on torch's current stream; with `steps` float32 [N], image n's is steps[n] scale[k].

    q int8 [N, H*W, C] with C a multiple of CHANNELS, weight int8 [K, R, R, C], scale float32 [K]; addend [N, P*Q, K] of out's
    type (may be `out`), or a bias float32 [K]. `size` is (H, W), `padding` (top, left, bottom, right). With `overlap` (compute
    capability 9.0 and later) the launch may begin while the one before it ends, which must not write scale or a bias then.
    Without `tile` it is that of `conv_tile`.
    """
    k, r = weight.shape[:2]
    geometry = Geometry(len(q), q.shape[2], *size, k, r, stride, padding)
    tile = tile or conv_tile(geometry)
    conv_kernel[(triton.cdiv(geometry.sites, tile.sites), triton.cdiv(k, tile.channels), tile.split)](
        q, q, weight, scale, addend, out, scale if steps is None else steps, scale, *scratch.for_tile(geometry, tile),
        geometry.sites, **geometry.constants,
        C2=0, INTEGER=True, BIAS=addend.ndim == 1, STEP=0 if steps is None else 2, CHANNELS_FIRST=False,
        SPLIT=tile.split, OVERLAP=overlap,
        BLOCK_M=tile.sites, BLOCK_N=tile.channels, BLOCK_K=tile.depth, STAGES=tile.stages,
        num_warps=tile.warps, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip


def convolve_real(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    overlap: bool = False,
) -> None:
    """out = bias[k] + weight * x on torch's current stream, x the one or two `sources` [N, H*W, C_i] side by side.

    All of one real type but bias and out, which may be wider; every C_i a multiple of 16, but for few inputs, which may also be
    of another type than the weight; weight [K, R, R, C]; out [N, P*Q, K]. The order of summation is the same for every batch.
    `overlap` as in `convolve_int8`; GPUs that have it also have tensor descriptors, through which 1x1 products of many pixels
    go.
    """
    (k, r), n = weight.shape[:2], len(sources[0])
    first, second = sources[0].shape[2], sources[1].shape[2] if len(sources) > 1 else 0
    geometry = Geometry(n, first, *size, k, r, stride, padding)
    if not second and has_few_inputs(first, r):
        convolve_few_inputs(sources[0], weight, bias, out=out, geometry=geometry, overlap=overlap)
        return
    if not second and has_few_outputs(k, r, stride):
        convolve_few_outputs(sources[0], weight, bias, out=out, geometry=geometry, overlap=overlap)
        return
    if overlap and r == stride == 1 and not any(padding) and out.dtype == weight.dtype and fits_descriptors(sources, k):
        multiply_real(sources, weight.view(k, -1), bias, out, overlap=overlap)
        return
    tile = real_tile(geometry, second)
    conv_kernel[(triton.cdiv(geometry.sites, tile.sites), triton.cdiv(k, tile.channels), 1)](
        sources[0], sources[-1], weight, bias, bias, out, bias, bias, bias, bias,
        geometry.sites, **geometry.constants | {"C": first},
        C2=second, INTEGER=False, BIAS=True, STEP=0, CHANNELS_FIRST=False, SPLIT=1, OVERLAP=overlap,
        BLOCK_M=tile.sites, BLOCK_N=tile.channels, BLOCK_K=tile.depth, STAGES=tile.stages,
        num_warps=tile.warps, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
