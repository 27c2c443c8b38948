"""`bench --costs`: what each layer's mode costs here, by whole passes with and without it.

A pass overlaps launches, shares sums between a block's convolutions, and folds work into the neighbour's launch. So a layer's
mode is timed as what a whole pass gains or loses by it: the pass with the scales' own modes and the pass with one group of
layers in another mode, run in turn. A group is the layers that have the same shapes, neighbours and mode.

A pass with one group changed says little about it: its time differs by what another instance of the network does, too. So
passes with all state gone, all layers in INT8 and all in float are timed as well, and some instances with nothing changed,
and `cost_estimates` weighs all of these.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
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
from modiff_trt.tools.bench.cost_estimates import Kind, Together, estimate
from modiff_trt.tools.bench.run import Load, run_passes, whole_intervals

# Mixtures whose time is predicted and measured, so that the file says how good its predictions are.
MIXTURES = 5
# Instances with nothing changed, whose times say how much instances differ.
INSTANCES = 4
Changes = dict[str, Mode]


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


def _together(changes: Sequence[Changes], modes: Mapping[str, Mode]) -> list[Changes]:
    """All state gone, every layer in INT8, and every layer in float where it can be. Each is timed once: where all layers have
    state the first two are the same, and in a small network one may be a change alone."""
    stateless: Changes = dict.fromkeys((name for name, mode in modes.items() if mode == Mode.MODIFF), Mode.INT8)
    integer: Changes = {name: mode for change in changes for name, mode in change.items() if mode == Mode.INT8}
    floating: Changes = {name: mode for change in changes for name, mode in change.items() if mode == Mode.FLOAT}
    found: list[Changes] = []
    for many in (stateless, integer, floating):
        if many and many not in (*changes, *found):
            found.append(many)
    return found


def _mixtures(changes: Sequence[Changes], modes: Mapping[str, Mode]) -> list[Changes]:
    """Mixtures by lot, from few changes to many: of all, and, as a choice of modes makes them, of those that take state."""
    generator = random.Random(0)
    of_state = [change for change in changes if _takes_state(change, modes)] or changes
    drawn: list[Changes] = []
    while len(drawn) < MIXTURES:
        mixture: Changes = {}
        for change in (changes, of_state)[len(drawn) % 2]:
            mixture |= {name: mode for name, mode in change.items() if generator.random() < (len(drawn) + 1) / (MIXTURES + 1)}
        drawn.append(mixture)
    return drawn


def _takes_state(change: Changes, modes: Mapping[str, Mode]) -> bool:
    return all(mode == Mode.INT8 and modes[name] == Mode.MODIFF for name, mode in change.items())


def measure_costs(
    network: Network,
    scales: Scales,
    make: Callable[[Scales], Denoiser],
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

    Images have the lines of `context`. `baselines` are microseconds an image of the network in floating point, by batch size.
    Times are medians of `runs`. What is measured stands in `part`, from where a second call with the same settings goes on; the
    caller removes it."""
    sizes = sorted(set(batch_sizes), reverse=True)  # buffers are allocated once, for the largest
    settings = {"sizes": sizes, "runs": runs, "passes": passes, "where": where, "scales": scales.file_sha256}
    kept = _resume(part, settings)
    loads = {size: Load.of(network, context, size) for size in sizes}
    base = make(scales)
    passes = whole_intervals(passes, [base])
    whole: dict[int, list[float]] = {size: list(kept["whole"].get(str(size), [])) for size in sizes}

    def differences(changes: Changes, instance: int = 0) -> dict[int, float]:
        """Microseconds an image that a pass takes more with these modes, of the network's `instance`-th making."""
        key = " ".join(f"{name}:{mode}" for name, mode in changes.items()) or f"instance {instance}"
        if key in kept["differences"]:
            return {size: kept["differences"][key][str(size)] for size in sizes}
        other, found = make(with_modes(scales, changes)), {}
        for size in sizes:
            _microseconds(other, loads[size], 1, device)  # packs weights for the CPU's products, captures on a GPU
            pairs = []
            for _ in range(runs):
                before, after = (_microseconds(d, loads[size], passes, device) for d in (base, other))
                whole[size].append(before)
                pairs.append(after - before)
            found[size] = statistics.median(pairs)
        kept["differences"][key] = {str(size): value for size, value in found.items()}
        kept["whole"] = {str(size): times for size, times in whole.items()}
        write_signed(part, kept)
        return found

    modes = {name: layer.mode for name, layer in scales.layers.items()}
    changes = [
        dict.fromkeys(names, mode)
        for names in groups(network, scales)
        for mode in (Mode.INT8, Mode.FLOAT)
        if mode != modes[names[0]]
    ]
    mixed = []
    for size in sizes:
        _microseconds(base, loads[size], passes, device)  # compiles, tunes and captures
    with progress_bar() as bar:
        alone = [differences(change) for change in bar.track(changes, description="costs")]
        many = [(change, differences(change)) for change in bar.track(_together(changes, modes), description="together")]
        again = [differences({}, i) for i in bar.track(range(INSTANCES), description="the same again")]
        for mixture in bar.track(_mixtures(changes, modes), description="mixtures"):
            mixed.append((mixture, differences(mixture)))
    batches = {}
    for size in sizes:
        took = statistics.median(whole[size])
        kinds = [_kind(network, modes, change, found[size]) for change, found in zip(changes, alone, strict=True)]
        together = [
            Together([change.items() <= all_of_it.items() for change in changes], found[size]) for all_of_it, found in many
        ]
        of_layer = estimate(kinds, together, [found[size] for found in again], took)
        added: dict[str, dict[Mode, float]] = {name: {} for name in modes}
        for change, cost in zip(changes, of_layer, strict=True):
            for name, mode in change.items():
                added[name][mode] = float(cost)
        costs = ModeCosts(where, size, took, base=modes, added=added, baseline=baselines.get(size))
        checks = []
        for mixture, took_more in mixed:
            predicted, measured = costs.predict(modes | mixture), costs.whole + took_more[size]
            counts = [(modes | mixture)[name] for name in modes]
            checks.append(
                {str(mode): counts.count(mode) for mode in Mode}
                | {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}
            )
        instances = [found[size] for found in again]
        batches[str(size)] = costs_to_dict(costs) | {
            "mixtures": checks,
            "same again": instances,
            "differences": {key: found[str(size)] for key, found in kept["differences"].items()},
        }
    return {"kind": KIND, "schema": SCHEMA, "batches": batches}


def _kind(network: Network, modes: Mapping[str, Mode], change: Changes, difference: float) -> Kind:
    """What is known of a change. Bytes tell what state costs. They do not tell INT8 from float: launches are shared or not, and
    small products are slower than either's operations."""
    name, mode = next(iter(change.items()))
    spec = network.layer(name)
    modelled = modelled_time(spec, mode) - modelled_time(spec, modes[name]) if _takes_state(change, modes) else None
    return Kind(len(change), modelled, difference)


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
