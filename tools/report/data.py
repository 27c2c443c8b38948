"""What the report shows of one scales file: trajectories of full precision, Q-Diffusion and MoDiff from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.manifest import quantization
from modiff_trt.core.progress import progress_bar
from modiff_trt.core.scales import Scales
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Network
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.tools.evaluation.measures import method_name

Float32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Trace:
    """One method's trajectory: final `samples` [N, C, H, W], and x and eps [steps, N, C, H, W] before each DDIM step."""

    name: str
    samples: Float32
    x: Float32
    eps: Float32


@dataclass(frozen=True)
class Comparison:
    """The methods side by side: full precision, quantization without state, and with it. `timesteps` are those of the steps;
    `weights_alone` is the PSNR in dB of the rounded weights with exact activations."""

    timesteps: tuple[int, ...]
    traces: tuple[Trace, ...]
    weights_alone: float

    def psnr(self, trace: Trace) -> float:
        """dB of a method's final images to full precision's."""
        return psnr(trace.samples, self.traces[0].samples)

    def eps_error(self, trace: Trace) -> Float32:
        """|eps - eps_float| / |eps_float| of each step [steps], each along its own trajectory."""
        exact = self.traces[0].eps
        error = np.sqrt(((trace.eps - exact) ** 2).sum((1, 2, 3, 4)) / (exact**2).sum((1, 2, 3, 4)))
        return np.asarray(error, np.float32)


def title_of(scales: Scales) -> str:
    """Method and bits, as the report and the README of a folder call a network."""
    about = quantization(scales.method, scales.granularity, scales.layer_table())
    method = method_name(about).replace("Q-Diff + ", "")
    return f"{method} W{about['weight_bits']}A{about['act_bits']}"


def compare(
    network: Network,
    checkpoint: Checkpoint,
    scales: Scales,
    *,
    images: int,
    seed: int,
    device: str,
    context: Context = NO_CONTEXT,
) -> Comparison:
    """Samples images 0..images-1 of `seed` with every method."""
    from modiff_trt.runtime.backends.registry import trained
    from modiff_trt.runtime.backends.registry.guidance import guided

    params, steps = checkpoint.params, scales.rows.timesteps
    plain = scales.without_modulation()
    made: dict[str, Callable[[], Denoiser]] = {
        "FP32": lambda: trained.unquantized(network, params, steps, device=device),
        title_of(plain): lambda: trained.simulated(network, params, plain, device=device),
        title_of(scales): lambda: trained.simulated(network, params, scales, device=device),
    }
    start = ImageNoise(seed, range(images), network.config.input_shape).draw()
    updates = scales.solver.updates(network.config.diffusion, steps)
    lines = context.of(range(images))
    traces = []
    with progress_bar() as bar:
        task = bar.add_task("trace", total=(len(made) + 1) * len(steps), unit="steps")
        for name, make in made.items():
            denoiser = guided(make(), context)
            kept: list[tuple[Float32, Float32]] = []

            def keep(row: int, x: Any, eps: Any, of: Denoiser = denoiser, to: list[tuple[Float32, Float32]] = kept) -> None:
                if row >= of.rows.warmup:
                    to.append((of.to_host(x), of.to_host(eps)))
                    bar.advance(task)

            samples = sample_trajectory(denoiser, updates, start, context=lines, on_pass=keep)
            traces.append(Trace(name, samples, np.stack([x for x, _ in kept]), eps=np.stack([eps for _, eps in kept])))
        alone = guided(trained.simulated(network, params, scales, device=device, act_quant=False), context)
        samples = sample_trajectory(alone, updates, start, context=lines)
        bar.advance(task, len(steps))
    return Comparison(steps, tuple(traces), psnr(samples, traces[0].samples))
