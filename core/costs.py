"""What each layer's mode costs in time, and the curve of time, state and accuracy that calibration finds with it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import read_signed
from modiff_trt.core.kinds import Mode

KIND, SCHEMA = "costs of modes", 1
REMEDY = "write it again with `modiff-trt bench --costs`"
# How far a prediction may be from the time that came, as a share of it.
TRUSTED = 0.05
# Decibels by which a slower mixture must be better than the chosen one to be worth a line.
FAR_BETTER = 3.0


@dataclass(frozen=True)
class ModeCosts:
    """Microseconds an image and pass, on one device at one batch size.

    `whole` is a pass with the modes `base`. `added[layer][mode]` is what it takes more when this layer has that mode instead;
    negative where it takes less. `baseline` is what the network takes in floating point; None where that was not measured.
    `errors` are those of predicted mixtures, as shares of the times that came.
    """

    device: str
    batch: int
    whole: float
    base: dict[str, Mode]
    added: dict[str, dict[Mode, float]]
    baseline: float | None = None
    errors: tuple[float, ...] = ()

    def predict(self, modes: Mapping[str, Mode]) -> float:
        """A pass with these modes. Raises InputError where the cost of one is not known."""
        return self.whole + sum(self.saving(name, mode) for name, mode in modes.items())

    def saving(self, name: str, mode: Mode) -> float:
        """What a pass takes more with this mode of a layer than with its mode in `base`."""
        if mode == self.base[name]:
            return 0.0
        if mode not in self.added[name]:
            raise InputError(f"the costs of modes do not have layer '{name}' as {mode}; {REMEDY}, with scales of these modes")
        return self.added[name][mode]

    def doubt(self) -> str | None:
        """One line where predictions were too far off to choose by."""
        most = max((abs(error) for error in self.errors), default=0.0)
        if most <= TRUSTED:
            return None
        return (
            f"costs of modes at batch {self.batch} predict mixtures with errors of up to {most:.0%}; do not choose by them: "
            "measure again with more --num-runs and --num-passes, while nothing else runs there"
        )


def costs_to_dict(costs: ModeCosts) -> dict[str, Any]:
    """Without `errors`, which a file has with their mixtures."""
    return {name: value for name, value in asdict(costs).items() if name != "errors"}


def load_costs(path: Path, layers: Iterable[str], batch: int | None) -> ModeCosts:
    """The costs in a file, at a batch size, or at the largest. Raises InputError where the file is of another network, or lacks
    that size."""
    data = read_signed(path, "costs of modes", REMEDY)
    if data.get("kind") != KIND or data.get("schema") != SCHEMA:
        raise InputError(f"{path} does not hold costs of modes; {REMEDY}")
    try:
        found = {int(size): costs_from_dict(entry) for size, entry in data["batches"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: the costs of modes are incomplete ({type(error).__name__}: {shown(str(error))}); {REMEDY}"
        ) from None
    if not found:
        raise InputError(f"{path} holds no batch size; {REMEDY}")
    batch = max(found) if batch is None else batch
    if batch not in found:
        raise InputError(f"{path} has batch sizes {', '.join(map(str, sorted(found)))}, not {batch}")
    if list(found[batch].base) != list(layers):
        raise InputError(f"{path} was measured on another network; {REMEDY}")
    return found[batch]


def costs_from_dict(entry: dict[str, Any]) -> ModeCosts:
    """The inverse of `costs_to_dict`."""
    base = {str(name): Mode(mode) for name, mode in entry["base"].items()}
    added = {name: {Mode(mode): float(cost) for mode, cost in entry["added"][name].items()} for name in base}
    baseline = None if entry["baseline"] is None else float(entry["baseline"])
    numbers = [float(entry["whole"]), *(cost for costs in added.values() for cost in costs.values())]
    if not all(math.isfinite(number) for number in numbers) or not min(numbers[0], baseline or 1.0) > 0:
        raise ValueError("a time that is not positive")
    errors = tuple(float(mixture["error"]) for mixture in entry["mixtures"])
    return ModeCosts(
        str(entry["device"]), int(entry["batch"]), numbers[0], base=base, added=added, baseline=baseline, errors=errors
    )


@dataclass(frozen=True)
class ModePoint:
    """One mixture of modes: its layers with state, microseconds an image and pass as predicted, bytes of state an image in
    float16, PSNR to FP32 in dB, the mean over the trial images, and the passes that a step of the sampler takes on average:
    more than one where state is brought up by warm-up passes."""

    modulated: int
    microseconds: float
    state_bytes: int
    decibels: float
    passes: float

    @property
    def step_microseconds(self) -> float:
        """Microseconds an image and step of the sampler."""
        return self.microseconds * self.passes


@dataclass(frozen=True)
class ModeCurve:
    """The mixtures that calibration tried, slowest step first, and which of them the scales have. `baseline` is the
    floating-point network's microseconds on `device`, where they are known: one pass a step."""

    device: str
    batch: int
    baseline: float | None
    points: tuple[ModePoint, ...]
    chosen: int

    def doubt(self, took: float) -> str | None:
        """One line where the chosen modes were predicted too far from the microseconds an image that they took."""
        predicted = self.points[self.chosen].microseconds
        if abs(predicted / took - 1) <= TRUSTED:
            return None
        return (
            f"the modes were chosen for {predicted:.1f} us an image at batch {self.batch} ({predicted / took - 1:+.0%}): "
            "others may be faster; measure costs again with more --num-runs and --num-passes, while nothing else runs there"
        )

    def advice(self) -> str | None:
        """One line where slower modes that were tried are far better than the chosen ones."""
        chosen = self.points[self.chosen]
        slower = [point for point in self.points if point.step_microseconds > chosen.step_microseconds]
        best = max(slower, key=lambda point: point.decibels, default=chosen)
        gained, longer = best.decibels - chosen.decibels, best.step_microseconds / chosen.step_microseconds - 1
        if gained < FAR_BETTER:
            return None
        if self.baseline is None:
            how = "--target-speed asks for such modes, by costs that have a floating-point network"
        else:
            how = f"--target-speed {math.floor(100 * self.baseline / best.step_microseconds) / 100:.2f} asks for such modes"
        return f"modes: {best.modulated} layers with state are {gained:.1f} dB better and take {longer:.1%} longer; {how}"


def curve_to_dict(curve: ModeCurve | None) -> dict[str, Any] | None:
    return None if curve is None else asdict(curve)


def curve_from_dict(data: Any, source: str) -> ModeCurve | None:
    """The inverse of `curve_to_dict`. Raises InputError where it is damaged. None also for a curve of an earlier version, which
    does not say what a step takes."""
    if data is None:
        return None
    try:
        if all("passes" not in point for point in data["points"]):
            return None
        points = tuple(
            ModePoint(
                int(p["modulated"]),
                float(p["microseconds"]),
                int(p["state_bytes"]),
                float(p["decibels"]),
                passes=float(p["passes"]),
            )
            for p in data["points"]
        )
        baseline = None if data["baseline"] is None else float(data["baseline"])
        curve = ModeCurve(str(data["device"]), int(data["batch"]), baseline, points=points, chosen=int(data["chosen"]))
        if not 0 <= curve.chosen < len(points) or not all(p.microseconds > 0 and p.passes >= 1 for p in points):
            raise ValueError("a point that cannot be")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source} has a damaged curve of modes ({type(error).__name__}: {shown(str(error))}); calibrate again"
        ) from None
    return curve
