"""What `modiff_trt` has for Python beside the stages of the command line: models, scales, denoisers and images as objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core import scales as scales_file
from modiff_trt.core.context import load_context
from modiff_trt.core.errors import InputError
from modiff_trt.core.scales import Scales
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Network
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.registry.options import (
    SamplingOptions,
    check_device,
    checkpoint_manifest,
    default_solver,
    load_backend,
)
from modiff_trt.runtime.backends.registry.options import load_model as load_network
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.runtime.sampling import Backend
from modiff_trt.tools.cli.quantized_folder import exported_of

BACKENDS = ("torch", "torch-sim", "native")


@dataclass(frozen=True)
class Model:
    """A network, its weights, and the solver that its files name."""

    network: Network
    checkpoint: Checkpoint
    solver: Solver


def load_model(
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    weights: str | None = None,
) -> Model:
    """A diffusers folder `model`, or a DDIM configuration with its checkpoint. `weights` is raw or ema, of a checkpoint that
    has both. Raises InputError for what cannot be read, or expressed."""
    folder, configuration = (None if path is None else Path(path) for path in (model, config))
    network, checkpoint = load_network(configuration, None if ckpt is None else Path(ckpt), weights, model=folder)
    return Model(network, checkpoint, default_solver(configuration, folder))


def load_scales(path: str | Path, model: Model) -> Scales:
    """The scales file of `calibrate`. Raises InputError where it is damaged, or of another checkpoint than the model's."""
    return scales_file.load_scales(Path(path), model.network, model.checkpoint.sha256)


def denoiser(
    model: Model | str | Path,
    scales: Scales | None = None,
    *,
    backend: str | None = None,
    device: str = "cpu",
    timesteps: int | None = None,
    context: str | Path | None = None,
    guidance: float | None = None,
    stream: int | None = None,
) -> Backend:
    """The network, ready to sample.

    `model` is what `load_model` gave, or the path of what is deployed: an exported .onnx file or a folder of `quantize`, which
    run on onnxruntime, or a TensorRT .plan. `backend` of a loaded model is native (the default: true INT8) or torch-sim, for
    `scales`, or torch: full precision, in `timesteps` steps (100) of the model's own solver. `device` is cpu or cuda. `context`
    is an .npz file of prompts or labels, and `guidance` the weight of classifier-free guidance. `stream` is the handle of a
    CUDA stream for a plan to run on, in place of its own. Raises InputError for what does not go together.
    """
    given_context = None if context is None else Path(context)
    if not isinstance(model, Model):
        if scales is not None or backend is not None:
            raise InputError(f"{model} carries its scales and is run by its own backend; leave both out")
        file = exported_of(Path(model))
        of_plan = file.suffix == ".plan"
        if stream is not None and not of_plan:
            raise InputError(f"{model} is no TensorRT plan, which alone runs on a stream of yours; leave the stream out")
        options = partial(SamplingOptions, timesteps=timesteps, device=device, context=given_context, guidance=guidance)
        return load_backend(options("trt", plan=file, stream=stream) if of_plan else options("onnx", onnx=file))
    if stream is not None:
        raise InputError("a stream is for a TensorRT plan; leave it out")
    backend = backend or "native"
    if backend not in BACKENDS:
        raise InputError(f"the backend must be one of {', '.join(BACKENDS)}, found '{backend}'")
    if (scales is None) != (backend == "torch"):
        raise InputError("scales go with the backends native and torch-sim, and torch has none")
    check_device(device)
    network, params = model.network, model.checkpoint.params
    given = load_context(given_context, guidance, network.config.architecture)
    solver = model.solver if scales is None else scales.solver
    made: Denoiser
    if scales is None:
        steps = solver.requested(network.config.diffusion, 100 if timesteps is None else timesteps)
        made = guided(trained.unquantized(network, params, steps, device=device), given)
    elif backend == "native":
        made = trained.native(network, params, scales, device, guidance=given.guidance)
    else:
        made = guided(trained.simulated(network, params, scales, device=device), given)
    return Backend(made, network.config, solver, manifest=checkpoint_manifest(model.checkpoint), context=given)


def sample(backend: Backend, images: int, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """Images 0..N-1 of `seed`, float32 [N, C, H, W], as `modiff-trt sample` makes them: pixels in -1..1 (not clipped), or
    latents. `backend` is what `denoiser` gives. Each image starts from its own generator, so that an image does not depend on
    N. Raises InputError for a result that is not finite."""
    if images < 1:
        raise InputError(f"the number of images must be at least 1, found {images}")
    start = ImageNoise(seed, range(images), backend.config.input_shape).draw()
    return sample_trajectory(backend.denoiser, backend.updates(eta=0.0), start, context=backend.context.of(range(images)))
