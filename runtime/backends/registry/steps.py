"""From the options of a command to a solver and its timesteps. No torch: a sampler is packed without it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modiff_trt.core.config import Config
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import FinalAlpha, Prediction, SolverKind, Spacing
from modiff_trt.core.manifest import NetworkManifest, solver_of_manifest
from modiff_trt.core.rows import RowTable
from modiff_trt.core.solvers import Solver

log = logging.getLogger(__name__)

DEFAULT_TIMESTEPS = 100


@dataclass(frozen=True)
class SolverOptions:
    """The options that decide a solver; None is 'not given'."""

    kind: SolverKind | None = None
    spacing: Spacing | None = None
    prediction: Prediction | None = None
    clip_sample: float | None = None
    steps_offset: int | None = None
    final_alpha: FinalAlpha | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def over(self, solver: Solver) -> Solver:
        """The solver with what was given in place of its own. Settings that belong to another spacing or solver are left."""
        if self.spacing not in (None, Spacing.LEADING):
            solver = replace(solver, steps_offset=0)
        if self.kind not in (None, SolverKind.DDIM):
            solver = replace(solver, final_alpha=FinalAlpha.ONE)
        return replace(solver, **self.given)


AS_IT_IS = SolverOptions()


def exported_sequence(
    config: Config,
    manifest: NetworkManifest,
    rows: RowTable | None,
    *,
    source: Path,
    timesteps: int | None,
    solver: SolverOptions,
) -> tuple[tuple[int, ...], Solver]:
    """Timesteps and solver of an exported network: its own, or for one in float those that the options put over them. Raises
    InputError for options that are not what a quantized one was calibrated on."""
    own = solver_of_manifest(manifest, str(source))
    if "solver" not in manifest:
        log.warning("%s does not say its solver: DDIM's own is taken; export it again", source)
    if rows is None:
        wanted = solver.over(own)
        return sequence(timesteps, config, wanted), wanted
    check_steps(timesteps, solver, config, calibrated=rows.timesteps, own=own, source=source)
    return rows.timesteps, own


def sequence(timesteps: int | None, config: Config, solver: Solver) -> tuple[int, ...]:
    """The timesteps of so many steps, DEFAULT_TIMESTEPS where none are asked for. Raises InputError."""
    return solver.requested(config.diffusion, timesteps if timesteps is not None else DEFAULT_TIMESTEPS)


def check_steps(
    timesteps: int | None, solver: SolverOptions, config: Config, *, calibrated: tuple[int, ...], own: Solver, source: Path
) -> None:
    """Scales hold for the steps that they were calibrated on: a residual depends on how far apart two steps are."""
    wanted = solver.over(own)
    if wanted == own and timesteps is None:
        return
    steps = timesteps if timesteps is not None else len(calibrated)
    if wanted != own or own.timesteps(config.diffusion, steps) != calibrated:
        raise InputError(
            f"{source} was calibrated for {own.describe(len(calibrated))}; leave these options out, or calibrate for "
            f"others: `modiff-trt collect {wanted.describe(steps)} ...`, then `calibrate`"
        )
