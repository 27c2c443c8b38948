"""`modiff-trt verify`: an engine against onnxruntime, pass by pass from the same noise, with polygraphy's comparison.

Both run the same file's numbers, so whatever differs beyond float rounding is the engine's doing. State outputs exist for
every modulated layer, in the order of execution: the first that differs names the layer to look at.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from modiff_trt.core.context import NO_CONTEXT, Arrays, Context
from modiff_trt.core.errors import InputError
from modiff_trt.core.extras import install_command
from modiff_trt.core.rows import RowTable
from modiff_trt.runtime.backends.onnx_denoiser import OnnxModel
from modiff_trt.runtime.backends.plan import Plan
from modiff_trt.runtime.backends.registry import exported
from modiff_trt.runtime.images.noise import ImageNoise

Array = np.ndarray[Any, Any]
EPS = "eps"


class Observable(Protocol):
    """A denoiser whose state can be looked at."""

    @property
    def rows(self) -> RowTable: ...
    @property
    def state(self) -> dict[str, Array]: ...
    def reset(self, batch: int, context: Arrays | None = None) -> None: ...
    def __call__(self, x: Any, row: int) -> Any: ...


@dataclass(frozen=True)
class Difference:
    """The first output that differs, in order of execution: its pass, name, largest difference and the size it is held to."""

    row: int
    output: str
    largest: float
    allowed: float


@dataclass(frozen=True)
class Verdict:
    """Passes compared, the largest relative difference of eps over them, and where the two part (None: nowhere)."""

    passes: int
    eps_error: float
    first: Difference | None


def verify(
    reference: Observable,
    candidate: Observable,
    input_shape: tuple[int, int, int],
    *,
    batch: int,
    passes: int,
    tolerance: float,
    seed: int = 0,
    context: Context = NO_CONTEXT,
    on_pass: Callable[[], None] = lambda: None,
) -> Verdict:
    """Runs both for some passes on the same x, and compares every output.

    An output may differ by `tolerance` times its own root mean square. Integers that fall on the other side of a rounding
    edge differ by a whole step, so the mean difference is compared, not the largest.
    """
    passes = min(passes, len(reference.rows))
    given = context.of(range(batch))
    reference.reset(batch, given)
    candidate.reset(batch, given)
    x = ImageNoise(seed, range(batch), input_shape).draw()
    worst = 0.0
    for row in range(passes):
        expected, found = _outputs(reference, x, row), _outputs(candidate, x, row)
        missing = sorted(set(expected) ^ set(found))
        if missing:
            raise InputError(f"the two have different outputs ({missing[0]}): the plan was built from another network")
        sizes = {name: float(np.sqrt(np.mean(np.square(v, dtype=np.float64)))) or 1.0 for name, v in expected.items()}
        verdicts = _compare(expected, found, {name: tolerance * size for name, size in sizes.items()})
        worst = max(worst, verdicts[EPS].mean_absdiff / sizes[EPS])
        for name, verdict in verdicts.items():
            if not verdict or not np.isfinite(found[name]).all():
                return Verdict(row + 1, worst, Difference(row, name, verdict.max_absdiff, allowed=tolerance * sizes[name]))
        on_pass()
    return Verdict(passes, worst, None)


def verify_plan(plan: Plan, model: OnnxModel, **options: Any) -> Verdict:
    """`verify` of a plan and the file it was built from. Raises InputError for another file, or where the plan cannot run."""
    check_pair(plan, model)
    engine = exported.tensorrt(plan, (0,))
    return verify(exported.onnxruntime(model, (0,)), engine, model.config.input_shape, **options)


def _compare(expected: dict[str, Array], found: dict[str, Array], allowed: dict[str, float]) -> Any:
    """polygraphy's comparison of mean errors, by output."""
    try:
        from polygraphy.comparator import IterationResult
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise InputError(f"verify needs polygraphy; pip install polygraphy, or {install_command('rtx')}") from None
    with warnings.catch_warnings(), G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from polygraphy.comparator import SimpleCompareFunc as simple
        except ImportError:  # its name before polygraphy 0.53
            from polygraphy.comparator import CompareFunc

            simple = CompareFunc.simple
        compare = simple(check_error_stat="mean", rtol=0.0, atol=allowed)
        return compare(IterationResult(expected, runner_name="onnxruntime"), IterationResult(found, runner_name="engine"))


def _outputs(denoiser: Observable, x: Array, row: int) -> dict[str, Array]:
    """State in the order of execution, then eps; all float32."""
    eps = np.asarray(denoiser(x, row))
    return {name: value.astype(np.float32) for name, value in denoiser.state.items()} | {EPS: eps}


def check_pair(plan: Plan, model: OnnxModel) -> None:
    """Raises InputError unless the plan was built from this file."""
    if model.sha256 != plan.manifest["onnx_sha256"]:
        raise InputError(f"{plan.path} was not built from {model.path}; verify it against the file named when it was built")


def print_verdict(verdict: Verdict, tolerance: float) -> int:
    """One line for the user; returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    if verdict.first is None:
        console.print(
            f"equal within {tolerance:g}: {verdict.passes} passes, eps differs by {verdict.eps_error:.2g} of its size"
        )
        return 0
    first = verdict.first
    layer = first.output.split(".", 1)[-1]
    console.print(
        f"different: {first.output} at pass {first.row} (largest difference {first.largest:.3g}, mean allowed "
        f"{first.allowed:.3g}); the first layer that differs is {layer}"
    )
    return 1
