"""From the options of a command to a network and a backend."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modiff_trt.core.config import model_fingerprint
from modiff_trt.core.context import load_context
from modiff_trt.core.ddim_yaml import config_solver, load_config
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import sha256
from modiff_trt.core.kinds import UNQUANTIZED, Granularity, Method
from modiff_trt.core.manifest import quantization
from modiff_trt.core.scales import load_scales
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.checkpoint import RAW_SUFFIX, Checkpoint, load_checkpoint
from modiff_trt.networks.diffusers_folder import load_folder, read_folder
from modiff_trt.networks.operations import Network
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.registry.steps import SolverOptions, check_steps, exported_sequence, sequence
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.sampling import Backend, Rank

log = logging.getLogger(__name__)

TORCH_BACKENDS = ("torch", "torch-sim", "native")
BACKENDS = ("torch", "torch-sim", "onnx", "native", "trt")


@dataclass(frozen=True)
class SamplingOptions:
    """The options that decide what a backend computes, as given on the command line (`stream` from Python alone); None is 'not
    given'."""

    backend: str
    config: Path | None = None
    ckpt: Path | None = None
    model: Path | None = None
    scales: Path | None = None
    onnx: Path | None = None
    timesteps: int | None = None
    solver: SolverOptions = field(default_factory=SolverOptions)
    modulate: bool = True
    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    plan: Path | None = None
    weights: str | None = None
    context: Path | None = None
    guidance: float | None = None
    runtime: str = "auto"
    stream: int | None = None


def load_model(
    config: Path | None, ckpt: Path | None, weights: str | None = None, *, model: Path | None = None
) -> tuple[Network, Checkpoint]:
    """The network of a configuration and its weights, or of a diffusers folder; which of a checkpoint's they are is said in the
    log where there was a choice. Raises InputError."""
    if model is not None:
        if config is not None or ckpt is not None or weights is not None:
            raise InputError("--model DIR stands for --config, --ckpt and --weights; leave these out")
        folder = read_folder(model)
        network = trace(folder.config)
        return network, load_folder(folder, network)
    if config is None:
        raise InputError("--config is missing; pass a DDIM configuration (configs/cifar10.yml), or --model DIR")
    if ckpt is None:
        raise InputError("--ckpt is missing; pass the checkpoint that belongs to the configuration")
    network = trace(load_config(config))
    checkpoint = load_checkpoint(ckpt, network, weights)
    if checkpoint.chosen:
        log.info("checkpoint %s: %s are used", ckpt, checkpoint.weights)
    return network, checkpoint


def default_solver(config: Path | None, model: Path | None) -> Solver:
    """What options are put over: the scheduler of a diffusers folder, or the sampler that a configuration comes with."""
    if model is not None:
        return read_folder(model).solver
    return Solver() if config is None else config_solver(config)


def checkpoint_manifest(checkpoint: Checkpoint) -> dict[str, str]:
    """What a manifest says of the weights."""
    known = {"checkpoint": checkpoint.description} if checkpoint.description else {}
    return {"checkpoint_sha256": checkpoint.sha256, "checkpoint_weights": checkpoint.weights, **known}


def check_device(device: str) -> str:
    """The torch device of an option. Raises InputError if it cannot be used here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, found {shown(device)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no NVIDIA GPU; pass --device cpu or install a CUDA build of torch")
    return device


def load_backend(options: SamplingOptions) -> Backend:
    """Builds the denoiser that the options describe. Raises InputError for options that contradict each other or files."""
    if options.dtype not in ("fp32", "fp16"):
        raise InputError(f"--dtype must be fp32 or fp16, found {shown(options.dtype)}")
    if options.backend != "torch" and options.dtype != "fp32":
        raise InputError(f"--dtype is for --backend torch; leave it out with {options.backend}")
    if options.backend not in ("torch", "torch-sim") and options.compile:
        raise InputError(f"--compile is for --backend torch and torch-sim; leave it out with {options.backend}")
    if options.backend not in TORCH_BACKENDS and options.weights is not None:
        raise InputError(f"--weights is decided at export; leave it out with --backend {shown(options.backend)[1:-1]}")
    if options.backend != "trt":
        _refuse(options.plan, "--plan", options.backend)
        _refuse(None if options.runtime == "auto" else options.runtime, "--runtime", options.backend)
    if options.backend == "onnx":
        return _onnx_backend(options)
    if options.backend == "trt":
        return _trt_backend(options)
    if options.backend in TORCH_BACKENDS:
        return _torch_backend(options)
    raise InputError(f"--backend must be one of {', '.join(BACKENDS)}, found {shown(options.backend)}")


def _torch_backend(options: SamplingOptions) -> Backend:
    import torch

    from modiff_trt.runtime.backends.registry import trained

    _refuse(options.onnx, "--onnx", options.backend)
    device = check_device(options.device)
    if device == "cuda":  # one process a GPU
        torch.cuda.set_device(Rank.of_environment().local % torch.cuda.device_count())
    network, checkpoint = load_model(options.config, options.ckpt, options.weights, model=options.model)
    config = network.config
    context = load_context(options.context, options.guidance, config.architecture)
    manifest: dict[str, Any] = {
        "backend": options.backend,
        **checkpoint_manifest(checkpoint),
        "config_sha256": model_fingerprint(config),
        **_context_manifest(options),
    }
    if options.backend == "torch":
        _refuse(options.scales, "--scales", "torch")
        if not options.modulate:
            raise InputError("--no-modulate is for quantized networks; leave it out with --backend torch")
        solver = options.solver.over(default_solver(options.config, options.model))
        timesteps = sequence(options.timesteps, config, solver)
        denoiser: Denoiser
        if options.dtype == "fp32" and not options.compile:
            denoiser = guided(trained.unquantized(network, checkpoint.params, timesteps, device=device), context)
        elif options.dtype == "fp16" and device == "cuda":
            denoiser = trained.compiled_fp16(
                network,
                checkpoint.params,
                timesteps,
                solver=solver,
                compiled=options.compile,
                guidance=context.guidance,
            )
        else:
            raise InputError("--compile goes with --dtype fp16, and both with --device cuda")
        made = {
            "quantization": quantization(UNQUANTIZED, Granularity.STATIC, {}),
            "dtype": options.dtype,
            "timesteps": list(timesteps),
            "solver": solver.to_dict(),
        }
        return Backend(denoiser, config, solver, manifest=manifest | made, context=context)
    if options.scales is None:
        raise InputError(f"--backend {options.backend} needs --scales FILE; make one with `modiff-trt calibrate`")
    scales = load_scales(options.scales, network, checkpoint.sha256)
    calibrated = scales.rows.timesteps
    check_steps(options.timesteps, options.solver, config, calibrated=calibrated, own=scales.solver, source=options.scales)
    if not options.modulate:
        scales = scales.without_modulation()
    if options.backend == "native":
        denoiser = trained.native(network, checkpoint.params, scales, device, guidance=context.guidance)
    elif options.backend == "torch-sim":
        simulated = trained.simulated(network, checkpoint.params, scales, device=device, compiled=options.compile)
        denoiser = guided(simulated, context)
    else:
        raise ValueError(f"no denoiser of a network and its scales is called {options.backend}")
    manifest |= {
        "scales_sha256": scales.file_sha256,
        "modulate": options.modulate,
        "quantization": quantization(scales.method, scales.granularity, scales.layer_table()),
        "timesteps": list(scales.rows.timesteps),
        "solver": scales.solver.to_dict(),
    }
    return Backend(denoiser, config, scales.solver, manifest=manifest, context=context)


def _onnx_backend(options: SamplingOptions) -> Backend:
    from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
    from modiff_trt.runtime.backends.registry.exported import onnx_backend

    if options.onnx is None:
        raise InputError("--backend onnx needs --onnx FILE; write one with `modiff-trt export`")
    _refuse(options.scales, "--scales", "onnx, whose file carries its scales")
    _refuse(options.model, "--model", "onnx, whose file carries it")
    model = load_onnx(options.onnx, options.device, gpu=Rank.of_environment().local)
    if options.config is not None and model_fingerprint(load_config(options.config)) != model_fingerprint(model.config):
        raise InputError(f"{options.onnx} was exported from another configuration than --config; leave --config out")
    if options.ckpt is not None and sha256(options.ckpt) != model.manifest["checkpoint_sha256"].removesuffix(RAW_SUFFIX):
        raise InputError(f"{options.onnx} was exported from another checkpoint than --ckpt; leave --ckpt out")
    if not options.modulate and model.manifest["method"] == Method.MODIFF:
        raise InputError("--no-modulate is decided at export; run `modiff-trt export --no-modulate` and sample from that file")
    timesteps, solver = exported_sequence(
        model.config,
        model.manifest,
        model.calibrated_rows,
        source=options.onnx,
        timesteps=options.timesteps,
        solver=options.solver,
    )
    context = load_context(options.context, options.guidance, model.config.architecture)
    found = onnx_backend(model, timesteps, solver, device=options.device)
    manifest = found.manifest | _context_manifest(options)
    return replace(found, denoiser=guided(found.denoiser, context), manifest=manifest, context=context)


def _trt_backend(options: SamplingOptions) -> Backend:
    from modiff_trt.runtime.backends.plan import load_plan
    from modiff_trt.runtime.backends.registry.exported import plan_backend

    if options.plan is None:
        raise InputError("--backend trt needs --plan FILE; build one with `modiff-trt build`")
    for value, option in (
        (options.scales, "--scales"),
        (options.onnx, "--onnx"),
        (options.config, "--config"),
        (options.ckpt, "--ckpt"),
        (options.model, "--model"),
    ):
        _refuse(value, option, "trt, whose plan carries it")
    plan = load_plan(options.plan)
    network = plan.manifest["network"]
    if not options.modulate and network["method"] == Method.MODIFF:
        raise InputError("--no-modulate is decided at export; run `modiff-trt export --no-modulate` and build from that file")
    timesteps, solver = exported_sequence(
        plan.config, network, plan.calibrated_rows, source=options.plan, timesteps=options.timesteps, solver=options.solver
    )
    context = load_context(options.context, options.guidance, plan.config.architecture)
    found = plan_backend(plan, timesteps, solver, runtime=options.runtime, stream=options.stream)
    manifest = found.manifest | _context_manifest(options)
    return replace(found, denoiser=guided(found.denoiser, context), manifest=manifest, context=context)


def _context_manifest(options: SamplingOptions) -> dict[str, Any]:
    """What images say of their context."""
    if options.context is None:
        return {}
    return {"context_sha256": sha256(options.context), "guidance": options.guidance}


def _refuse(value: Path | float | str | None, option: str, backend: str) -> None:
    if value is not None:
        raise InputError(f"{option} does not go with --backend {backend}; leave it out")
