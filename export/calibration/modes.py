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
from functools import cache
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
# Stands behind the changes of a mixture whose other layers lose their state too.
NO_STATE = -1


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
    `microseconds` is given, the most accurate one that takes no longer an image and step of the sampler, with its share of
    the warm-up passes that state needs."""

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
    base = scales.modes
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
    tried: dict[tuple[Mode, ...], tuple[Scales, ModePoint]] = {}

    @cache
    def mixture(made: tuple[int, ...]) -> Scales:
        """With these changes of the order."""
        changed = dict.fromkeys(scales.modulated if NO_STATE in made else (), Mode.INT8)
        return with_modes(scales, changed | {ordered[index].layer: ordered[index].mode for index in made if index != NO_STATE})

    def step(made: tuple[int, ...]) -> float:
        """Microseconds an image and step of the sampler."""
        return costs.predict(mixture(made).modes) * passes_a_step(mixture(made))

    def measure(made: tuple[int, ...]) -> float:
        """Mean PSNR of the mixture with these changes of the order."""
        mixed = mixture(made)
        modes = tuple(mixed.modes.values())
        if modes not in tried:
            size = STATE_BYTES * sum(state_elements(mixed, network).values())
            takes, decibels = costs.predict(mixed.modes), trials.mean_decibels(mixed)
            point = ModePoint(len(mixed.modulated), takes, size, decibels, passes=passes_a_step(mixed))
            took = f"{point.step_microseconds:.2f} us an image and step"
            report(f"modes: {point.modulated} layers with state, {took}: {point.decibels:.2f} dB")
            tried[modes] = mixed, point
        return tried[modes][1].decibels

    totals = [sum(change.saved for change in ordered[:count]) for count in range(len(ordered) + 1)]
    wanted = [totals[-1] * part / (POINTS - 1) - 1e-9 for part in range(POINTS)]
    counts = sorted({next(count for count, total in enumerate(totals) if total >= enough) for enough in wanted})
    for count in counts:
        measure(_first(count))
    bare = _without_state(ordered, scales, costs)
    if goal.microseconds is None:
        least = measure(()) - goal.max_loss
        begun = _largest(lambda count: measure(_first(count)), counts, least)
        _try_further(measure, ordered, begun, least=least)
        fastest = min(point.step_microseconds for _, point in tried.values() if point.decibels >= least)
        # The most accurate of them are the slowest. Where these lose too much, so do all.
        if bare and step(bare[-1]) < fastest and measure(bare[0]) >= least:
            _largest(lambda count: measure(bare[count]), sorted({0, len(bare) - 1}), least)
        good = [modes for modes, (_, point) in tried.items() if point.decibels >= least]
        fastest_first = sorted(good, key=lambda modes: tried[modes][1].step_microseconds)
        chosen = _confirmed(others, scales, {modes: tried[modes][0] for modes in fastest_first}, goal.max_loss, report)
    else:
        limit = goal.microseconds + 1e-6
        for family in ([_first(count) for count in range(len(totals))], bare):
            for made in family:
                if step(made) <= limit:
                    measure(made)
                    break
        # More changes lose more, as a rule. Where all state is not the best of modes, a faster mixture may be better.
        fast = [modes for modes, (_, point) in tried.items() if point.step_microseconds <= limit]
        chosen = max(fast, key=lambda modes: tried[modes][1].decibels)
    slowest_first = sorted(tried, key=lambda modes: -tried[modes][1].step_microseconds)
    points = tuple(tried[modes][1] for modes in slowest_first)
    curve = ModeCurve(costs.device, costs.batch, costs.baseline, points=points, chosen=slowest_first.index(chosen))
    return replace(tried[chosen][0], curve=curve)


def passes_a_step(scales: Scales) -> float:
    """How many passes of the network a step of the sampler takes, warm-up passes spread over all steps."""
    return len(scales.rows) / len(scales.rows.timesteps)


def _can_lose_state(scales: Scales, costs: ModeCosts) -> bool:
    """Whether it is known what every layer with state takes without it."""
    return all(Mode.INT8 in costs.added[name] for name in scales.modulated)


def _without_state(ordered: Sequence[Change], scales: Scales, costs: ModeCosts) -> list[tuple[int, ...]]:
    """Mixtures without any state, the most accurate first and the fastest last: they need no warm-up passes, and so may be
    faster where a pass by itself is not. Empty where nothing says what they take."""
    if not _can_lose_state(scales, costs):
        return []
    floats = [index for index, change in enumerate(ordered) if change.mode == Mode.FLOAT]
    in_float = {ordered[index].layer for index in floats} | (scales.layers.keys() - set(scales.modulated))
    # First into float, and then, one after the other, from float to INT8.
    back = [index for index, change in enumerate(ordered) if change.mode == Mode.INT8 and change.layer in in_float]
    return [(*floats, *back[:count], NO_STATE) for count in range(len(back) + 1)]


def _confirmed(
    others: Trials, whole: Scales, good: Mapping[tuple[Mode, ...], Scales], max_loss: float, report: Report
) -> tuple[Mode, ...]:
    """The first of these mixtures that loses no more of `whole`, which is one of them, on other images. Of many mixtures that
    were tried on a few images, the fastest that is good enough there is so by luck, in part (docs/lab/modes.md)."""
    before = others.mean_decibels(whole)
    for modes, scales in good.items():
        lost = before - others.mean_decibels(scales)
        enough = lost <= max_loss
        said = f"modes: {len(scales.modulated)} layers with state lose {lost:.2f} dB on other images"
        report(said if enough else f"{said}: too much")
        if enough:
            return modes
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
    """Raises InputError where the changes that there are cannot make a step as fast as the goal, or where they would take more
    time from a pass than it has: costs that were measured in the noise of a machine."""
    costs, most = goal.costs, dict[str, float]()
    for name, _, saved in options:
        most[name] = max(most.get(name, 0.0), saved)
    fastest = costs.predict(scales.modes) - sum(most.values())
    if not fastest > 0:
        raise InputError(
            f"by the costs of modes a pass on {costs.device} could take {fastest:.2f} us an image, which cannot be; "
            "measure them again with more --num-runs and --num-passes, while nothing else runs there"
        )
    if goal.microseconds is None:
        return
    # Layers whose state costs a pass nothing keep it, and with it the warm-up passes.
    keep = set(scales.modulated) - most.keys()
    step = fastest * passes_a_step(scales) if keep else fastest
    if _can_lose_state(scales, costs):
        step = min(step, fastest + sum(costs.saving(name, Mode.INT8) - costs.saving(name, Mode.MODIFF) for name in keep))
    if step > goal.microseconds:
        raise InputError(
            f"no mixture of modes takes {goal.microseconds:.2f} us an image and step on {costs.device}; "
            f"the fastest takes {step:.2f}"
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
