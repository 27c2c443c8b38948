"""The sampling job: batches of images with one generator each, to an .npz or to a PNG folder that can be resumed. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.config import Config
from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.errors import InputError, is_out_of_memory, out_of_memory, shown
from modiff_trt.core.files import check_writable
from modiff_trt.core.kinds import Granularity
from modiff_trt.core.manifest import NetworkManifest, quantization
from modiff_trt.core.progress import progress_bar
from modiff_trt.core.solvers import Solver, Updates
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.folders import PICTURE_CHANNELS, ImageFolder, ShardFolder, save_npz
from modiff_trt.runtime.images.noise import ImageNoise, load_noise
from modiff_trt.runtime.sampler import sample_trajectory

MOST_IMAGES, LAST_IMAGE = 10_000_000, 10**12


@dataclass(frozen=True)
class Backend:
    """A denoiser, the configuration it runs, the solver of its rows, the manifest of what it was made from, and what its images
    are conditioned on."""

    denoiser: Denoiser
    config: Config
    solver: Solver
    manifest: dict[str, Any]
    context: Context = NO_CONTEXT

    def updates(self, eta: float) -> Updates:
        """The numbers of the denoiser's steps. Raises InputError for an eta that the solver cannot take."""
        return self.solver.updates(self.config.diffusion, self.denoiser.rows.timesteps, eta)


def exported(manifest: NetworkManifest, timesteps: tuple[int, ...], solver: Solver) -> dict[str, Any]:
    """What images say of the exported file that made them, from the file's manifest."""
    granularity = Granularity(manifest.get("granularity", Granularity.STATIC))
    known = {"checkpoint": manifest["checkpoint"]} if manifest["checkpoint"] else {}
    return {
        "checkpoint_sha256": manifest["checkpoint_sha256"],
        "checkpoint_weights": manifest["checkpoint_weights"],
        **known,
        "quantization": quantization(manifest["method"], granularity, manifest["layers"]),
        "dtype": manifest["dtype"],
        "timesteps": list(timesteps),
        "solver": solver.to_dict(),
    }


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must lie between 0 and 2^63 - 1, found {seed}")


def image_range(num_samples: int, seeds: str | None) -> range:
    """The indices of the images to make: 0..num_samples-1, or `a-b` (both ends included). Raises InputError."""
    if seeds is None:
        if not 1 <= num_samples <= MOST_IMAGES:
            raise InputError(f"--num-samples must lie between 1 and {MOST_IMAGES}")
        return range(num_samples)
    first, dash, last = seeds.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise InputError(f"--seeds must be a range like 0-49999, found {shown(seeds)}")
    found = range(int(first), int(last) + 1)
    if found[-1] >= LAST_IMAGE or len(found) > MOST_IMAGES:
        raise InputError(f"--seeds must lie below {LAST_IMAGE}, and name at most {MOST_IMAGES} images")
    return found


@dataclass(frozen=True)
class Rank:
    """Which process of how many this is, and which on its machine, as torchrun tells them: 0 of 1 where it is alone."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Rank:
        """From RANK, WORLD_SIZE and LOCAL_RANK. Raises InputError if they are not numbers, or do not fit."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        try:
            found = cls(*(int(os.environ.get(name, alone)) for name, alone in names.items()))
        except ValueError:
            raise InputError("RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them") from None
        if not 0 <= found.rank < found.world:
            raise InputError(f"RANK {found.rank} does not lie below WORLD_SIZE {found.world}")
        return found

    def batches(self, indices: range, size: int) -> list[list[int]]:
        """This rank's batches of the indices. Batches are cut before they are dealt out, so that an image is computed in
        the same company whatever the number of ranks."""
        cut = [list(indices[begin : begin + size]) for begin in range(0, len(indices), size)]
        return cut[self.rank :: self.world]


def does_not_fit(backend: Backend, batch: list[int]) -> InputError:
    """The one line for a batch that is too large. Which half, or half of that, and so on, does fit is tried."""
    size = len(batch) // 2
    while size:
        start = ImageNoise(0, batch[:size], backend.config.input_shape).draw()
        try:
            backend.denoiser.reset(size, backend.context.of(batch[:size]))
            backend.denoiser(backend.denoiser.from_host(start), 0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return out_of_memory(f"a batch of {len(batch)} does not fit; a batch of {size} does: pass --batch-size {size}")
        size //= 2
    return out_of_memory(
        f"a batch of {len(batch)} does not fit, and one image at a time is too much already: use a machine with more"
    )


def sample_batches(
    backend: Backend, batches: list[list[int]], seed: int, eta: float, noise: Mapping[int, np.ndarray[Any, Any]] | None = None
) -> Any:
    """Yields (indices, samples float32 [n, C, H, W]) batch by batch, under a progress bar that counts passes.

    `noise` [C, H, W] of an image replaces its x_T; noise of later steps (eta > 0) still comes from the image's own generator.
    """
    updates, denoiser = backend.updates(eta), backend.denoiser
    with progress_bar() as bar:
        task = bar.add_task("sample", total=sum(map(len, batches)) * len(denoiser.rows), unit="passes")
        for batch in batches:
            source = ImageNoise(seed, batch, backend.config.input_shape)
            start = source.draw()
            if noise is not None:
                start = np.stack([noise[index] for index in batch])

            def on_done(passes: int, n: int = len(batch)) -> None:
                bar.advance(task, passes * n)

            try:
                lines = backend.context.of(batch)
                samples = sample_trajectory(denoiser, updates, start, context=lines, draw_noise=source.draw, on_done=on_done)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                samples = None
            if samples is None:  # outside of `except`, whose error holds on to what did not fit
                raise does_not_fit(backend, batch)
            yield batch, samples


@dataclass(frozen=True)
class Sampled:
    """What a process was asked for, and what it did: its share of the images, and how many of them are new."""

    rank: Rank
    images: int
    new: int


def run_sampling(
    backend: Backend,
    *,
    indices: range,
    seed: int,
    batch_size: int,
    eta: float,
    noise_file: Path | None,
    out: Path,
    shards: bool = False,
) -> Sampled:
    """Samples the images `indices` of `seed` into `out`: FILE.npz, or a folder of PNG files or (`shards`) of uint8 arrays.

    Under torchrun each process makes its share of a folder. A batch of which any image is missing is computed whole, so that an
    interrupted run ends with the same files as an uninterrupted one.
    """
    if batch_size < 1:
        raise InputError("--batch-size must be at least 1")
    check_seed(seed)
    # What the schedule refuses must not claim the folder.
    backend.updates(eta)
    channels = backend.config.input_shape[0]
    if out.suffix != ".npz" and channels not in PICTURE_CHANNELS:
        raise InputError(f"the network makes images of {channels} channels, which are no pictures; pass FILE.npz as --out")
    if out.suffix != ".npz" and backend.config.latent:
        raise InputError(
            "the network makes latents, which are no pictures before the pipeline's autoencoder has decoded them; "
            "pass FILE.npz as --out"
        )
    noise, noise_digest = None, None
    if noise_file is not None:
        given, noise_digest = load_noise(noise_file, indices[-1] + 1, backend.config.input_shape)
        noise = dict(enumerate(given))
    manifest = backend.manifest | {
        "seed": seed,
        "eta": eta,
        "noise_sha256": noise_digest,
        # Libraries may sum in another order for another batch: images of one set are computed in one way.
        "batch_size": batch_size,
    }
    rank = Rank.of_environment()
    batches = rank.batches(indices, batch_size)
    if out.suffix == ".npz":
        if rank.world > 1 or shards:
            raise InputError("shards, and several processes, cannot write one .npz; pass a folder as --out")
        check_writable(out)
        parts = [s for _, s in sample_batches(backend, batches, seed, eta=eta, noise=noise)]
        save_npz(out, np.concatenate(parts), indices, manifest=manifest)
        return Sampled(rank, len(indices), len(indices))
    with ShardFolder(out, manifest) if shards else ImageFolder(out, manifest) as folder:
        missing = [len(folder.missing(batch)) for batch in batches]
        wanted = [batch for batch, lacking in zip(batches, missing, strict=True) if lacking]
        for batch, samples in sample_batches(backend, wanted, seed, eta=eta, noise=noise):
            folder.save(batch, samples)
    return Sampled(rank, sum(map(len, batches)), sum(missing))
