"""The sampling job: batches of images with one generator each, to an .npz or to a PNG folder that can be resumed. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.export.config import Config
from modiff_trt.export.errors import InputError
from modiff_trt.export.files import sha256
from modiff_trt.runtime.denoiser import Denoiser, WholeTrajectory
from modiff_trt.runtime.images import ImageFolder, save_npz
from modiff_trt.runtime.noise import ImageNoise, load_noise
from modiff_trt.runtime.sampler import ddim_sample
from modiff_trt.runtime.schedule import alphas_cumprod
from modiff_trt.tools.progress import progress_bar


@dataclass(frozen=True)
class Backend:
    """A denoiser, the configuration it runs, and the manifest of what it was made from."""

    denoiser: Denoiser
    config: Config
    manifest: dict[str, Any]


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must lie between 0 and 2^63 - 1, found {seed}")


def sample_batches(
    backend: Backend, indices: list[int], seed: int, batch_size: int, eta: float, noise: np.ndarray[Any, Any] | None = None
) -> Any:
    """Yields (indices, samples float32 [n, C, H, W]) batch by batch, under a progress bar that counts passes.

    `noise` [N, C, H, W] replaces x_T of image i by noise[i]; the noise of later steps (eta > 0) still comes from the
    image's own generator.
    """
    alpha_bar = alphas_cumprod(backend.config.diffusion)
    denoiser = backend.denoiser
    with progress_bar() as bar:
        task = bar.add_task("sample", total=len(indices) * len(denoiser.rows), unit="passes")
        for begin in range(0, len(indices), batch_size):
            batch = indices[begin : begin + batch_size]
            source = ImageNoise(seed, batch, backend.config.input_shape)
            start = source.draw()
            if noise is not None:
                start = noise[batch]
            size = len(batch)

            def on_pass(row: int, x: Any, eps: Any, n: int = size) -> None:
                bar.advance(task, n)

            # A backend that runs a whole trajectory on its device must not be stopped at every pass to draw a bar.
            whole = eta == 0.0 and isinstance(denoiser, WholeTrajectory)
            samples = ddim_sample(
                denoiser, alpha_bar, start, eta=eta, draw_noise=source.draw, on_pass=None if whole else on_pass
            )
            if whole:
                bar.advance(task, size * len(denoiser.rows))
            yield batch, samples


def run_sampling(
    backend: Backend, *, num_samples: int, seed: int, batch_size: int, eta: float, noise_file: Path | None, out: Path
) -> int:
    """Samples images 0..num_samples-1 into `out` (FILE.npz, or a folder) and returns how many were computed now."""
    if num_samples < 1 or batch_size < 1:
        raise InputError("--num-samples and --batch-size must be at least 1")
    check_seed(seed)
    noise = load_noise(noise_file, num_samples, backend.config.input_shape) if noise_file is not None else None
    manifest = backend.manifest | {
        "seed": seed,
        "eta": eta,
        "noise_sha256": sha256(noise_file) if noise_file is not None else None,
    }
    if out.suffix == ".npz":
        parts = [s for _, s in sample_batches(backend, list(range(num_samples)), seed, batch_size, eta, noise)]
        save_npz(out, np.concatenate(parts), manifest)
        return num_samples
    folder = ImageFolder(out, manifest)
    missing = folder.missing(range(num_samples))
    for batch, samples in sample_batches(backend, missing, seed, batch_size, eta, noise):
        folder.save(batch, samples)
    return len(missing)
