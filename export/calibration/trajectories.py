"""Trajectory files: x_t of full-precision DDIM runs at chosen steps and at the step before each.

MoDiff quantizes what changed between two consecutive steps, so a chosen step is useless without its predecessor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.config import Config, config_to_dict, model_fingerprint, stored_config
from modiff_trt.core.context import MOST_GUIDANCE, NO_CONTEXT, Context, context_arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import load_arrays, save_arrays
from modiff_trt.core.solvers import Solver, solver_from_dict

KIND, SCHEMA = "trajectories", 3


@dataclass(frozen=True)
class Trajectories:
    """`x` [S, N, C, H, W] float32 at the steps `steps` [S] (ascending indices into `timesteps`); `chosen` is the
    subset that calibration looks at, each of which except step 0 has its predecessor in `steps`. Image i is conditioned on
    line i of `context`."""

    config: Config
    checkpoint_sha256: str
    solver: Solver
    timesteps: tuple[int, ...]
    seed: int
    steps: np.ndarray[Any, np.dtype[np.int64]]
    chosen: np.ndarray[Any, np.dtype[np.int64]]
    x: np.ndarray[Any, np.dtype[np.float32]]
    context: Context = NO_CONTEXT


def choose_steps(total: int, count: int) -> tuple[list[int], list[int]]:
    """(chosen, stored) step indices: `count` of `total` spread evenly with the first and last, and their predecessors."""
    chosen = sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})
    stored = sorted(set(chosen) | {i - 1 for i in chosen if i > 0})
    return chosen, stored


def save_trajectories(path: Path, trajectories: Trajectories) -> None:
    header = {
        "kind": KIND,
        "schema": SCHEMA,
        "config": config_to_dict(trajectories.config),
        "checkpoint_sha256": trajectories.checkpoint_sha256,
        "solver": trajectories.solver.to_dict(),
        "timesteps": list(trajectories.timesteps),
        "seed": trajectories.seed,
        "guidance": trajectories.context.guidance,
    }
    arrays: dict[str, np.ndarray[Any, Any]] = {"x": trajectories.x, "steps": trajectories.steps, "chosen": trajectories.chosen}
    for side, lines in (("positive", trajectories.context.positive), ("negative", trajectories.context.negative)):
        arrays |= {f"{side}.{name}": value for name, value in lines.items()}
    save_arrays(path, header, arrays)


def load_trajectories(path: Path, config: Config, checkpoint_sha256: str) -> Trajectories:
    """Reads a trajectory file and checks that this configuration and checkpoint made it."""
    header, arrays, _ = load_arrays(path, KIND, SCHEMA)
    try:
        result = Trajectories(
            stored_config(header["config"], str(path)),
            header["checkpoint_sha256"],
            solver_from_dict(header["solver"], f"trajectories file {path}"),
            timesteps=tuple(header["timesteps"]),
            seed=header["seed"],
            steps=arrays["steps"],
            chosen=arrays["chosen"],
            x=arrays["x"],
            context=_context(header["guidance"], arrays),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"trajectories file {path} is incomplete ({error}); collect again") from None
    if not _is_sound(result):
        raise InputError(f"trajectories file {path} has a header that does not fit its arrays; collect again")
    if model_fingerprint(result.config) != model_fingerprint(config):
        raise InputError(
            f"trajectories file {path} was collected with another configuration; pass its --config or collect again"
        )
    if result.checkpoint_sha256 != checkpoint_sha256:
        raise InputError(
            f"trajectories file {path} was collected with another checkpoint, or its other weights (raw, EMA); pass those, or "
            "collect again"
        )
    if not np.isfinite(result.x).all():
        raise InputError(f"trajectories file {path} holds NaN or infinite values; collect again")
    return result


def _context(guidance: float | None, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Context:
    """Raises TypeError for a guidance that is no number."""
    if guidance is not None and not isinstance(guidance, float):
        raise TypeError("guidance")
    positive, negative = (
        {key.removeprefix(side): array for key, array in arrays.items() if key.startswith(side)}
        for side in ("positive.", "negative.")
    )
    return Context(positive, negative, guidance)


def _is_sound(found: Trajectories) -> bool:
    """Whether types, shapes and numbers are those of a trajectory file."""
    total, count = found.config.diffusion.num_diffusion_timesteps, len(found.timesteps)
    steps, chosen = found.steps, found.chosen
    if type(found.seed) is not int:
        return False
    if not count or not all(type(t) is int and 0 <= t < total for t in found.timesteps):
        return False
    if any(part.dtype != np.int64 or part.ndim != 1 or not len(part) or (np.diff(part) <= 0).any() for part in (steps, chosen)):
        return False
    there = set(steps.tolist())
    if not all(0 <= s < count for s in there) or not {p for s in chosen.tolist() for p in (s, s - 1) if p >= 0} <= there:
        return False
    x, context = found.x, found.context
    wanted = context_arrays(found.config.architecture)
    for lines in (context.positive,) if context.guidance is None else (context.positive, context.negative):
        if set(lines) != set(wanted):
            return False
        if not all(wanted[name].holds(value, found.config.architecture.classes) for name, value in lines.items()):
            return False
    if context.guidance is not None and not (wanted and 0 <= context.guidance <= MOST_GUIDANCE):
        return False
    return x.dtype == np.float32 and x.ndim == 5 and x.shape[0] == len(steps) and x.shape[2:] == found.config.input_shape
