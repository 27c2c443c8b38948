"""The collecting job: full-precision trajectories for calibration, batch by batch, resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import check_writable
from modiff_trt.core.progress import progress_bar
from modiff_trt.core.solvers import Solver
from modiff_trt.export.calibration.trajectories import Trajectories, choose_steps, load_trajectories, save_trajectories
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Network
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.runtime.sampling import check_seed


def collect(
    network: Network,
    checkpoint: Checkpoint,
    *,
    timesteps: int,
    solver: Solver,
    num_samples: int,
    calib_steps: int,
    seed: int,
    batch_size: int,
    device: str,
    out: Path,
    context: Context = NO_CONTEXT,
) -> Trajectories:
    """Runs the solver on `num_samples` images, image i conditioned on line i of the context, and writes x_t at `calib_steps`
    steps and the step before each.

    What is finished stands in `<out>.part` until all of it is; a second call goes on from there.
    """
    if min(num_samples, batch_size, calib_steps) < 1:
        raise InputError("--num-samples, --batch-size and --calib-steps must be at least 1")
    check_seed(seed)
    check_writable(out)
    config = network.config
    sequence = solver.requested(config.diffusion, timesteps)
    chosen, stored = choose_steps(len(sequence), calib_steps)
    empty = np.zeros((len(stored), 0, *config.input_shape), np.float32)
    result = Trajectories(
        config,
        checkpoint.sha256,
        solver,
        timesteps=sequence,
        seed=seed,
        steps=np.asarray(stored, np.int64),
        chosen=np.asarray(chosen, np.int64),
        x=empty,
        context=context,
    )
    part = out.with_name(out.name + ".part")
    result = _resume(part, result, num_samples)
    denoiser = guided(trained.unquantized(network, checkpoint.params, sequence, device=device), context)
    updates = solver.updates(config.diffusion, sequence)
    with progress_bar() as bar:
        task = bar.add_task("collect", total=num_samples * len(sequence), unit="passes")
        while (done := result.x.shape[1]) < num_samples:
            indices = range(done, min(done + batch_size, num_samples))
            bar.update(task, completed=done * len(sequence))
            kept: dict[int, np.ndarray[Any, Any]] = {}

            def keep(row: int, x: Any, eps: Any, kept: dict[int, Any] = kept, n: int = len(indices)) -> None:
                if row in stored:
                    kept[row] = denoiser.to_host(x).copy()
                bar.advance(task, n)

            noise = ImageNoise(seed, indices, config.input_shape).draw()
            sample_trajectory(denoiser, updates, noise, context=context.of(indices), on_pass=keep)
            x = np.concatenate([result.x, np.stack([kept[step] for step in stored])], axis=1)
            result = replace(result, x=x)
            save_trajectories(part, result)
    save_trajectories(out, result)
    part.unlink(missing_ok=True)
    return result


def _resume(part: Path, fresh: Trajectories, num_samples: int) -> Trajectories:
    """What an interrupted run of the same job left, or `fresh`."""
    if not part.exists():
        return fresh
    try:
        old = load_trajectories(part, fresh.config, fresh.checkpoint_sha256)
    except InputError:
        return fresh
    made = [(t.solver, t.timesteps, t.seed, t.steps.tolist(), t.chosen.tolist()) for t in (old, fresh)]
    same = made[0] == made[1] and old.context.same_as(fresh.context)
    return old if same and old.x.shape[1] <= num_samples else fresh
