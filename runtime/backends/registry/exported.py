"""Backends of what was exported: an ONNX file, or a plan built from one. No torch."""

from __future__ import annotations

from modiff_trt.core.solvers import Solver
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, OnnxModel
from modiff_trt.runtime.backends.plan import Plan
from modiff_trt.runtime.backends.trt_denoiser import TrtDenoiser
from modiff_trt.runtime.sampling import Backend, Rank, exported


def onnxruntime(model: OnnxModel, timesteps: tuple[int, ...], device: str = "cpu") -> OnnxDenoiser:
    """onnxruntime on an exported file."""
    return OnnxDenoiser(model, timesteps, device)


def tensorrt(
    plan: Plan, timesteps: tuple[int, ...], *, gpu: int = 0, runtime: str = "auto", stream: int | None = None
) -> TrtDenoiser:
    """TensorRT on a plan, on a stream of its own or the one with this handle. Raises InputError for a plan that this machine
    cannot run."""
    return TrtDenoiser(plan, timesteps, stream, gpu=gpu, runtime=runtime)


def onnx_backend(model: OnnxModel, timesteps: tuple[int, ...], solver: Solver, device: str) -> Backend:
    """onnxruntime on an exported file; `timesteps` are those of its rows, or of the trajectory for a float network."""
    manifest = {"backend": "onnx", "onnx_sha256": model.sha256, **exported(model.manifest, timesteps, solver)}
    return Backend(onnxruntime(model, timesteps, device), model.config, solver, manifest)


def plan_backend(
    plan: Plan, timesteps: tuple[int, ...], solver: Solver, *, runtime: str = "auto", stream: int | None = None
) -> Backend:
    """TensorRT on a plan, on this process' GPU. Raises InputError for a plan that this machine cannot run."""
    manifest = {"backend": "trt", "plan_sha256": plan.manifest["plan_sha256"]}
    manifest |= exported(plan.manifest["network"], timesteps, solver)
    denoiser = tensorrt(plan, timesteps, gpu=Rank.of_environment().local, runtime=runtime, stream=stream)
    return Backend(denoiser, plan.config, solver, manifest)
