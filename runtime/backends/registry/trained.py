"""Denoisers of a network and its weights. The libraries that one needs are imported when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from modiff_trt.core.errors import InputError
from modiff_trt.core.scales import Scales
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Params

if TYPE_CHECKING:
    from modiff_trt.runtime.backends.compiled_denoiser import CompiledDenoiser
    from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
    from modiff_trt.runtime.backends.native.ops import Kernels
    from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser, TorchDenoiser


def unquantized(
    network: Network,
    params: Params,
    timesteps: tuple[int, ...],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TorchDenoiser:
    """The network as trained: FP32 is the reference."""
    from modiff_trt.runtime.backends.torch_denoiser import TorchDenoiser

    return TorchDenoiser(network, params, timesteps, device=device, dtype=dtype)


def compiled_fp16(
    network: Network,
    params: Params,
    timesteps: tuple[int, ...],
    solver: Solver,
    *,
    compiled: bool = True,
    guidance: float | None = None,
) -> CompiledDenoiser:
    """The network as trained, in FP16 on CUDA: the baseline of speed. Guidance is part of its pass."""
    from modiff_trt.runtime.backends.compiled_denoiser import CompiledDenoiser

    if not torch.cuda.is_available():
        raise InputError("FP16 through torch.compile is for --device cuda")
    return CompiledDenoiser(network, params, timesteps, solver=solver, compiled=compiled, guidance=guidance)


def simulated(network: Network, params: Params, scales: Scales, device: str = "cpu", **options: Any) -> SimDenoiser:
    """Quantization in floating point; `options` are those of `SimDenoiser`."""
    from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser

    return SimDenoiser(network, params, scales, device=device, **options)


def native(
    network: Network, params: Params, scales: Scales, device: str = "cpu", *, guidance: float | None = None
) -> NativeDenoiser:
    """True INT8, with guidance as part of a pass. Raises InputError where it cannot run, or cannot run these scales."""
    return alike_natives(network, params, device, guidance=guidance)(scales)


def alike_natives(
    network: Network, params: Params, device: str = "cpu", *, guidance: float | None = None
) -> Callable[[Scales], NativeDenoiser]:
    """`native` for several scales of one network, which is faster for those that differ from the first in few layers. They
    share what products need between launches: run one at a time."""
    from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
    from modiff_trt.runtime.backends.native.layers import KeptLayers

    kept = KeptLayers()
    # Loading the tuned plans of a large network's products takes seconds. On a CPU, products hold weights.
    shared = native_kernels(device) if device == "cuda" else None

    def make(scales: Scales) -> NativeDenoiser:
        kernels = shared or native_kernels(device)
        return NativeDenoiser(network, params, scales, kernels=kernels, device=device, guidance=guidance, kept=kept)

    return make


def native_kernels(device: str) -> Kernels:
    """The native kernels of a device. Raises InputError where they cannot run."""
    if device == "cuda":
        from modiff_trt.runtime.backends.native.cuda_kernels import CudaKernels

        return CudaKernels()
    from modiff_trt.runtime.backends.native.cpu_kernels import CpuKernels

    return CpuKernels()
