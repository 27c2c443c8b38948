"""`bench --costs`: what each layer's mode costs here, by whole passes with and without it.

A pass overlaps launches, shares sums between a block's convolutions, and folds work into the neighbour's launch. So a layer's
mode is timed as what a whole pass gains or loses by it: two passes that differ in one group of layers, run in turn. A group is
the layers that have the same shapes, neighbours and mode. What its state costs is timed beside the scales' own modes. What
float costs it, or INT8 where the scales have float, is timed in a pass without any state: in the fastest mixtures most layers
have none.

A pass with one group changed says little about it: its time differs by what another instance of the network does, too. So
passes with all state gone, all layers in INT8 and all in float are timed as well, and some instances with nothing changed,
and `cost_estimates` weighs all of these.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.costs import KIND, REMEDY, SCHEMA, ModeCosts, costs_to_dict
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import read_signed, write_signed
from modiff_trt.core.kinds import Mode
from modiff_trt.core.progress import progress_bar
from modiff_trt.core.scales import Scales
from modiff_trt.export.calibration.modes import modelled_time, with_modes
from modiff_trt.networks.operations import Network
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.tools.bench.cost_estimates import Kind, Passes, Whole, estimate
from modiff_trt.tools.bench.run import Load, run_passes, whole_intervals

# Mixtures whose time is predicted and measured, so that the file says how good its predictions are.
MIXTURES = 5
# Instances with nothing changed beside each pass, whose times say how much instances differ.
INSTANCES = 3
Changes = dict[str, Mode]


@dataclass(frozen=True)
class Beside:
    """A network that others are timed beside, which `make` makes: these share with it what they do not change."""

    scales: Scales
    make: Callable[[Scales], Denoiser]
    denoiser: Denoiser
    stateless: bool

    @classmethod
    def of(cls, scales: Scales, make: Callable[[Scales], Denoiser], stateless: bool) -> Beside:
        return cls(scales, make, make(scales), stateless)


def groups(network: Network, scales: Scales) -> list[tuple[str, ...]]:
    """The layers by what their launches look like."""
    beside = {spec.beside for spec in network.layers}
    added_to = {spec.added_to for spec in network.layers}
    found: dict[Any, list[str]] = {}
    for spec in network.layers:
        shape = (spec.in_shape, spec.out_shape, spec.kernel, spec.stride, spec.upsampled, spec.normalized, spec.split > 0)
        place = (spec.role, spec.name in beside, spec.name in added_to, scales.layers[spec.name].mode)
        found.setdefault((shape, place), []).append(spec.name)
    return [tuple(names) for names in found.values()]


def _together(flips: Sequence[Changes]) -> list[Changes]:
    """Every layer in INT8, and every layer in float where it can be, if these are not changes alone."""
    found: list[Changes] = []
    for mode in (Mode.INT8, Mode.FLOAT):
        many: Changes = {name: mode for change in flips for name, other in change.items() if other == mode}
        if many and many not in flips:
            found.append(many)
    return found


def _mixtures(removals: Sequence[Changes], flips: Sequence[Changes]) -> list[Changes]:
    """Mixtures by lot, from few changes to many: of all, and, as a choice of modes makes them, of those that take state."""
    generator = random.Random(0)
    drawn: list[Changes] = []
    while len(drawn) < MIXTURES:
        mixture: Changes = {}
        for change in ([*removals, *flips], removals or flips)[len(drawn) % 2]:
            mixture |= {name: mode for name, mode in change.items() if generator.random() < (len(drawn) + 1) / (MIXTURES + 1)}
        drawn.append(mixture)
    return drawn


def measure_costs(
    network: Network,
    scales: Scales,
    make: Callable[[], Callable[[Scales], Denoiser]],
    batch_sizes: Sequence[int],
    *,
    runs: int,
    passes: int,
    device: str,
    where: str,
    baselines: dict[int, float],
    part: Path,
    context: Context = NO_CONTEXT,
) -> dict[str, Any]:
    """The content of a file of costs: for each batch size `ModeCosts`, and mixtures with their predicted and measured times.

    `make()` makes networks that share what they do not change. Images have the lines of `context`. `baselines` are microseconds
    an image of the network in floating point, by batch size. Times are medians of `runs`. What is measured stands in `part`,
    from where a second call with the same settings goes on; the caller removes it."""
    sizes = sorted(set(batch_sizes), reverse=True)  # buffers are allocated once, for the largest
    settings = {"sizes": sizes, "runs": runs, "passes": passes, "where": where, "scales": scales.file_sha256}
    kept = _resume(part, settings)
    loads = {size: Load.of(network, context, size) for size in sizes}
    modes = scales.modes
    stateless: Changes = dict.fromkeys(scales.modulated, Mode.INT8)
    base = Beside.of(scales, make(), stateless=False)
    bare = Beside.of(with_modes(scales, stateless), make(), stateless=True) if stateless else base
    passes = whole_intervals(passes, [base.denoiser])
    whole: dict[int, list[float]] = {size: list(kept["whole"].get(str(size), [])) for size in sizes}

    def differences(beside: Beside, changes: Changes, instance: int = 0) -> dict[int, float]:
        """Microseconds an image that a pass takes more with these modes, of the network's `instance`-th making."""
        names = " ".join(f"{name}:{mode}" for name, mode in changes.items()) or f"instance {instance}"
        key = f"without state, {names}" if beside.stateless else names
        if key in kept["differences"]:
            return {size: kept["differences"][key][str(size)] for size in sizes}
        other, found = beside.make(with_modes(beside.scales, changes)), {}
        for size in sizes:
            _microseconds(other, loads[size], 1, device)  # packs weights for the CPU's products, captures on a GPU
            pairs = []
            for _ in range(runs):
                before, after = (_microseconds(d, loads[size], passes, device) for d in (beside.denoiser, other))
                if beside is base:
                    whole[size].append(before)
                pairs.append(after - before)
            found[size] = statistics.median(pairs)
        kept["differences"][key] = {str(size): value for size, value in found.items()}
        kept["whole"] = {str(size): times for size, times in whole.items()}
        write_signed(part, kept)
        return found

    alike = groups(network, scales)
    removals = [dict.fromkeys(names, Mode.INT8) for names in alike if modes[names[0]] == Mode.MODIFF]
    flips = [dict.fromkeys(names, Mode.INT8 if modes[names[0]] == Mode.FLOAT else Mode.FLOAT) for names in alike]
    alone = [(base, change) for change in removals] + [(bare, change) for change in flips]
    many = [(base, stateless)] * (len(removals) > 1) + [(bare, change) for change in _together(flips)]
    places = [base, bare] if stateless else [base]
    for size in sizes:
        for beside in places:
            _microseconds(beside.denoiser, loads[size], passes, device)  # compiles, tunes and captures
    with progress_bar() as bar:
        seen = [
            (beside, change, differences(beside, change))
            for what, timed in (("costs", alone), ("together", many))
            for beside, change in bar.track(timed, description=what)
        ]
        again = [
            (beside, i, differences(beside, {}, i))
            for beside, i in bar.track([(p, i) for p in places for i in range(INSTANCES)], description="the same again")
        ]
        mixtures = _mixtures(removals, flips)
        mixed = [(mixture, differences(base, mixture)) for mixture in bar.track(mixtures, description="mixtures")]
    changes = [*removals, *flips]
    kinds = [_kind(network, modes, change) for change in changes]
    batches = {}
    for size in sizes:
        took = statistics.median(whole[size])
        rows = [
            Passes([change.items() <= all_of_it.items() for change in changes], beside.stateless, found[size])
            for beside, all_of_it, found in seen
        ]
        rows += [Passes([False] * len(changes), beside.stateless, found[size]) for beside, _, found in again]
        modelled = sum(modelled_time(spec, modes[spec.name]) for spec in network.layers)
        of_layer, of_instance = estimate(kinds, rows, Whole(took, modelled, len(modes)))
        added: dict[str, dict[Mode, float]] = {name: {} for name in modes}
        for change, cost in zip(changes, map(float, of_layer), strict=True):
            for name, mode in change.items():
                # Of a layer with state, float is timed beside INT8, whose cost comes first.
                added[name][mode] = cost + added[name].get(Mode.INT8, 0.0)
        # Networks with other modes are other instances. On a CPU those are slower than the first one by 1 or 2 %.
        costs = ModeCosts(where, size, took + of_instance, base=modes, added=added, baseline=baselines.get(size))
        checks = []
        for mixture, took_more in mixed:
            predicted, measured = costs.predict(modes | mixture), took + took_more[size]
            counts = [(modes | mixture)[name] for name in modes]
            checks.append(
                {str(mode): counts.count(mode) for mode in Mode}
                | {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}
            )
        batches[str(size)] = costs_to_dict(costs) | {
            "mixtures": checks,
            "differences": {key: found[str(size)] for key, found in kept["differences"].items()},
        }
    return {"kind": KIND, "schema": SCHEMA, "batches": batches}


def _kind(network: Network, modes: Mapping[str, Mode], change: Changes) -> Kind:
    """What the model says of a change. A layer may gain or lose as much as a share of what it does; of its state, of what state
    moves."""
    name, mode = next(iter(change.items()))
    loses_state = modes[name] == Mode.MODIFF and mode == Mode.INT8
    # Float is timed beside INT8 where the scales have state.
    before = Mode.INT8 if modes[name] == Mode.MODIFF and mode == Mode.FLOAT else modes[name]
    took, takes = (modelled_time(network.layer(name), each) for each in (before, mode))
    return Kind(len(change), takes - took, took - takes if loses_state else max(took, takes), loses_state)


def _resume(part: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call with the same settings has measured."""
    if part.exists():
        with contextlib.suppress(InputError):
            kept = read_signed(part, "costs of modes", REMEDY)
            if kept.get("settings") == settings:
                return kept
    return {"settings": settings, "differences": {}, "whole": {}}


def _microseconds(denoiser: Denoiser, load: Load, passes: int, device: str) -> float:
    """Of a pass, an image."""
    return statistics.fmean(run_passes(denoiser, load, passes, device=device)) * 1e6 / len(load.x)
