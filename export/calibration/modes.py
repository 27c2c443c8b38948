"""Modes by measurement: which layers keep MoDiff state, which are plain INT8, and which stay in float.

Two things are known of every change of a layer's mode: the microseconds that it saves (`core.costs`), and how far it moves the
final image, by a trial trajectory in which only this layer has the other mode. The activations of all others are exact, and the
image is compared with the one in which this layer's is exact too. If others rounded, any change would move what they round, by
more than most layers' own error; beside the images of FP32 the error of the weights would hide it (docs/lab/modes.md). The
convex hull of both, layer by layer, gives one order in which to make the changes: most time for least error first (a knapsack
with several choices a layer, by Lagrange multipliers). What a mixture is worth is then measured on whole trajectories, against
FP32, as the mean over the images of their PSNR, and what is chosen must be as good on images that nothing was chosen by.
Errors do not quite add up: where the order's next change would lose too much, it is left out, and those after it are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from modiff_trt.core.costs import ModeCosts, ModeCurve, ModePoint
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Mode
from modiff_trt.core.rows import RowTable, plain_rows
from modiff_trt.core.scales import Scales
from modiff_trt.export.calibration.trials import Report, Trials
from modiff_trt.networks.operations import LayerSpec, Network
from modiff_trt.networks.state_elements import state_elements
from modiff_trt.runtime.backends.native.floors import layer_work

# What one H200 reached (results/bench_h200.json), for those who have measured no costs.
CEILINGS = {"copy_bytes_a_second": 4.25e12, "int8_operations_a_second": 1.49e15, "fp16_operations_a_second": 7.5e14}
MODELLED = "an H200, modelled"
# Mixtures of the curve that are measured in any case, evenly spaced in time.
POINTS = 8
# Changes that may lose too much before the search ends.
MOST_LEFT_OUT = 6
# The difference of images that are not finite.
UNUSABLE = 1e9
# Bytes of an element of state.
STATE_BYTES = 2


@dataclass(frozen=True)
class Change:
    """Another mode for one layer: the microseconds that it saves beyond the change of this layer before it, and the mean
    squared difference of the image that it adds."""

    layer: str
    mode: Mode
    saved: float
    added: float


@dataclass(frozen=True)
class Goal:
    """What the modes are chosen for: the fastest mixture that loses at most `max_loss` dB of all-modulated, or, where
    `microseconds` is given, the most accurate one that takes no longer a pass and image."""

    costs: ModeCosts
    max_loss: float
    microseconds: float | None = None


def modelled_time(spec: LayerSpec, mode: Mode) -> float:
    """Microseconds an image that the launches of a layer take at least, by their bytes and operations."""
    return sum(work.least(CEILINGS) for work in layer_work(spec, mode))


def modelled_costs(network: Network, scales: Scales) -> ModeCosts:
    """Costs of a GPU by the bytes and operations of each layer's launches, where none were measured.

    Only what state costs is modelled: an H200 took 1.5 times as long for it, in large images and in small ones
    (docs/lab/modes.md). What a layer in float would gain by INT8, and the other way round, depends on launches that are shared;
    bytes do not tell.
    """
    base = {name: layer.mode for name, layer in scales.layers.items()}
    whole = 0.0
    added: dict[str, dict[Mode, float]] = {}
    for spec in network.layers:
        mode = base[spec.name]
        took = modelled_time(spec, mode)
        whole += took
        added[spec.name] = {Mode.INT8: modelled_time(spec, Mode.INT8) - took} if mode == Mode.MODIFF else {}
    return ModeCosts(MODELLED, 0, whole, base=base, added=added)


def possible_changes(scales: Scales, costs: ModeCosts) -> list[tuple[str, Mode, float]]:
    """(layer, mode, microseconds saved) of every change that saves time and needs no other calibration."""
    found: list[tuple[str, Mode, float]] = []
    for name, layer in scales.layers.items():
        for mode in (Mode.INT8, Mode.FLOAT):
            if mode != layer.mode and mode in costs.added[name]:
                saved = costs.saving(name, layer.mode) - costs.saving(name, mode)
                if saved > 0:
                    found.append((name, mode, saved))
    return found


def in_order(options: Sequence[Change]) -> list[Change]:
    """The changes worth making, most time saved for the error first. Of each layer those on the convex hull, one after the
    other; `options` have what they save and add from the mode that the layer has."""
    ordered: list[Change] = []
    for _, of_layer in groupby(sorted(options, key=lambda c: c.layer), key=lambda c: c.layer):
        rest, saved, added = list(of_layer), 0.0, 0.0
        while rest := [c for c in rest if c.saved > saved]:
            # The next corner of the hull: the least error for each microsecond from here; of equals the one that saves most.
            best = min(rest, key=lambda c: (max(c.added - added, 0.0) / (c.saved - saved), -c.saved))
            ordered.append(replace(best, saved=best.saved - saved, added=max(best.added - added, 0.0)))
            saved, added = best.saved, max(best.added, added)
    return sorted(ordered, key=lambda c: c.added / c.saved)


def search_modes(
    trials: Trials, scales: Scales, goal: Goal, *, alone: Trials, others: Trials, report: Report, on_trial: Callable[[], None]
) -> Scales:
    """The scales with modes chosen for `goal`, and the curve of the mixtures that were tried.

    `alone` are the trials of single layers: fewer images will do to order them. `on_trial` is called after each of these.
    `others` has images that nothing was chosen by: the loss must be within the goal's there too. Raises InputError where no
    mixture can be as fast as the goal asks.
    """
    costs, network = goal.costs, trials.network
    options = possible_changes(scales, costs)
    reach_goal(scales, goal, options)
    stateless = with_modes(scales, dict.fromkeys(scales.modulated, Mode.INT8))
    exact = alone.images_of(stateless, act_quant=False)
    changes = []
    for name, mode, saved in options:
        # A layer in float rounds nothing.
        added = 0.0 if mode == Mode.FLOAT else alone.difference(with_modes(stateless, {name: mode}), name, exact)
        changes.append(Change(name, mode, saved, min(added, UNUSABLE)))
        on_trial()
    ordered = in_order(changes)
    tried: dict[tuple[int, ...], tuple[Scales, ModePoint]] = {}

    def measure(made: tuple[int, ...]) -> float:
        """Mean PSNR of the mixture with these changes of the order."""
        if made not in tried:
            mixed = with_modes(scales, {ordered[index].layer: ordered[index].mode for index in made})
            modes = {name: layer.mode for name, layer in mixed.layers.items()}
            size = STATE_BYTES * sum(state_elements(mixed, network).values())
            point = ModePoint(len(mixed.modulated), costs.predict(modes), size, trials.mean_decibels(mixed))
            report(f"modes: {point.modulated} layers with state, {point.microseconds:.2f} us an image: {point.decibels:.2f} dB")
            tried[made] = mixed, point
        return tried[made][1].decibels

    totals = [sum(change.saved for change in ordered[:count]) for count in range(len(ordered) + 1)]
    for part in range(POINTS):
        enough = totals[-1] * part / (POINTS - 1) - 1e-9
        measure(_first(next(count for count, total in enumerate(totals) if total >= enough)))
    if goal.microseconds is None:
        least = tried[()][1].decibels - goal.max_loss
        begun = _largest(lambda count: measure(_first(count)), sorted(map(len, tried)), least)
        _try_further(measure, ordered, begun, least=least)
        fastest_first = sorted(tried, key=lambda made: tried[made][1].microseconds)
        good = [made for made in fastest_first if tried[made][1].decibels >= least]
        chosen = _confirmed(others, {made: tried[made][0] for made in good}, goal.max_loss, report)
    else:
        before, limit = costs.predict({name: layer.mode for name, layer in scales.layers.items()}), goal.microseconds + 1e-6
        measure(_first(next(count for count, total in enumerate(totals) if before - total <= limit)))
        # More changes lose more, as a rule. Where all state is not the best of modes, a faster mixture may be better.
        fast = [made for made in tried if tried[made][1].microseconds <= limit]
        chosen = max(fast, key=lambda made: tried[made][1].decibels)
    slowest_first = sorted(tried, key=lambda made: -tried[made][1].microseconds)
    points = tuple(tried[made][1] for made in slowest_first)
    curve = ModeCurve(costs.device, costs.batch, costs.baseline, points=points, chosen=slowest_first.index(chosen))
    return replace(tried[chosen][0], curve=curve)


def _confirmed(others: Trials, good: Mapping[tuple[int, ...], Scales], max_loss: float, report: Report) -> tuple[int, ...]:
    """The first of these mixtures that loses no more on other images; the one without changes loses nothing. Of many mixtures
    that were tried on a few images, the fastest that is good enough there is so by luck, in part (docs/lab/modes.md)."""
    whole = others.mean_decibels(good[()])
    for made, scales in good.items():
        lost = whole - others.mean_decibels(scales)
        enough = lost <= max_loss
        said = f"modes: {len(scales.modulated)} layers with state lose {lost:.2f} dB on other images"
        report(said if enough else f"{said}: too much")
        if enough:
            return made
    raise AssertionError("what has no changes loses nothing")


def _first(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _try_further(measure: Callable[[tuple[int, ...]], float], ordered: Sequence[Change], begun: int, *, least: float) -> None:
    """Measures what the first `begun` changes give with each of the others, in their order. Those that leave `least` dB are
    made; a layer whose change is left out keeps its mode."""
    made, left_out = _first(begun), set[str]()
    for index in range(begun, len(ordered)):
        if len(left_out) == MOST_LEFT_OUT:
            break
        if ordered[index].layer in left_out:
            continue
        if measure((*made, index)) >= least:
            made = (*made, index)
        else:
            left_out.add(ordered[index].layer)


def reach_goal(scales: Scales, goal: Goal, options: Sequence[tuple[str, Mode, float]]) -> None:
    """Raises InputError where the changes that there are cannot make a pass as fast as the goal, or where they would take more
    time from it than it has: costs that were measured in the noise of a machine."""
    most: dict[str, float] = {}
    for name, _, saved in options:
        most[name] = max(most.get(name, 0.0), saved)
    fastest = goal.costs.predict({name: layer.mode for name, layer in scales.layers.items()}) - sum(most.values())
    if not fastest > 0:
        raise InputError(
            f"by the costs of modes a pass on {goal.costs.device} could take {fastest:.2f} us an image, which cannot be; "
            "measure them again with more --num-runs and --num-passes, while nothing else runs there"
        )
    if goal.microseconds is not None and fastest > goal.microseconds:
        raise InputError(
            f"no mixture of modes takes {goal.microseconds:.2f} us an image and pass on {goal.costs.device}; "
            f"the fastest takes {fastest:.2f}"
        )


def _largest(measure: Callable[[int], float], counts: Sequence[int], least: float) -> int:
    """The largest number of changes that keeps `least` dB: between the best of `counts` and the next one, by bisection."""
    low = max(count for count in counts if measure(count) >= least)
    high = next((count for count in counts if count > low), low + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) >= least else (low, middle)
    return low


def with_modes(scales: Scales, modes: Mapping[str, Mode]) -> Scales:
    """The same scales with other modes for some layers, none of which gets state, and the row table's columns to match."""
    # Layers that keep their mode stay the same objects, by which `KeptLayers` knows them.
    layers = scales.layers | {name: replace(scales.layers[name], mode=mode) for name, mode in modes.items()}
    if all(layer.mode != Mode.MODIFF for layer in layers.values()):
        return replace(scales, layers=layers, dither=False, rows=plain_rows(scales.rows.timesteps))
    keep = [i for i, name in enumerate(scales.modulated) if name not in modes]
    rows = RowTable(scales.rows.t, scales.rows.multipliers[:, keep], scales.rows.warmup, exact_start=scales.rows.exact_start)
    return replace(scales, layers=layers, rows=rows)
