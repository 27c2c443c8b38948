import itertools
from dataclasses import replace

import numpy as np
import pytest

from modiff_trt.core.costs import ModeCosts, ModeCurve, ModePoint, curve_from_dict, curve_to_dict
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import load_scales, save_scales
from modiff_trt.export.calibration.modes import (
    CEILINGS,
    MOST_LEFT_OUT,
    Change,
    Goal,
    _try_further,
    in_order,
    modelled_costs,
    modelled_time,
    possible_changes,
    search_modes,
    with_modes,
)
from modiff_trt.export.calibration.trials import MOST_DECIBELS, Trials
from modiff_trt.networks.state_elements import state_elements
from modiff_trt.runtime.backends.native.floors import layer_work
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.tools.report.inspecting import print_table, save_plots


@pytest.fixture(scope="module")
def trials(tiny):
    return Trials(tiny.network, tiny.checkpoint, tiny.timesteps, tiny.trajectories.solver, images=3, seed=2, device="cpu")


@pytest.fixture(scope="module")
def alone(tiny):
    return Trials(tiny.network, tiny.checkpoint, tiny.timesteps, tiny.trajectories.solver, images=1, seed=3, device="cpu")


def search(trials, alone, scales, goal, others=None):
    calls = []
    found = search_modes(
        trials,
        scales,
        goal,
        alone=alone,
        others=trials if others is None else others,
        report=lambda line: None,
        on_trial=lambda: calls.append(1),
    )
    return found, len(calls)


def test_changes_are_made_in_the_order_of_the_best_mixtures():
    generator = np.random.default_rng(3)
    options = [
        Change(layer, mode, saved=float(saved), added=float(added))
        for layer in "abcd"
        for mode, saved, added in zip(
            (Mode.INT8, Mode.FLOAT), generator.uniform(1, 5, 2), generator.uniform(0, 9, 2), strict=True
        )
    ]
    ordered = in_order(options)
    by_layer = {name: [None, *(c for c in options if c.layer == name)] for name in "abcd"}
    everything = [
        (sum(c.saved for c in kept if c), sum(c.added for c in kept if c)) for kept in itertools.product(*by_layer.values())
    ]
    for count in range(len(ordered) + 1):
        saved = sum(change.saved for change in ordered[:count])
        added = sum(change.added for change in ordered[:count])
        # No mixture saves as much and adds less.
        assert added <= min(a for s, a in everything if s >= saved - 1e-9) + 1e-9
        modes = {change.layer: change.mode for change in ordered[:count]}
        assert saved == pytest.approx(sum(c.saved for c in options if modes.get(c.layer) == c.mode))
    assert sum(c.saved for c in ordered) == pytest.approx(max(s for s, _ in everything))


def test_a_change_that_adds_more_and_saves_less_is_never_made():
    ordered = in_order([Change("a", Mode.INT8, saved=2.0, added=1.0), Change("a", Mode.FLOAT, saved=1.0, added=2.0)])
    assert ordered == [Change("a", Mode.INT8, saved=2.0, added=1.0)]


def test_modelled_costs_are_of_the_bytes_and_operations_of_a_layer(tiny):
    scales = tiny.scales()
    costs = modelled_costs(tiny.network, scales)
    modes = {name: layer.mode for name, layer in scales.layers.items()}
    assert costs.predict(modes) == costs.whole and costs.base == modes
    name = scales.modulated[-1]
    spec = tiny.network.layer(name)
    plain, whole = (sum(w.least(CEILINGS) for w in layer_work(spec, mode)) for mode in (Mode.INT8, Mode.MODIFF))
    assert costs.predict(modes | {name: Mode.INT8}) == pytest.approx(costs.whole + plain - whole)
    assert [(n, m) for n, m, _ in possible_changes(scales, costs)] == [(n, Mode.INT8) for n in scales.modulated]
    assert modelled_time(spec, Mode.FLOAT) > plain > 0


def test_the_fastest_modes_within_a_loss(trials, alone, tiny, tmp_path, capsys):
    scales = tiny.scales(act_bits=8)
    costs = modelled_costs(tiny.network, scales)
    best, count = search(trials, alone, scales, Goal(costs, max_loss=1.0))
    assert count == len(possible_changes(scales, costs))
    whole = trials.mean_decibels(scales)
    curve = best.curve
    assert curve.points[0].decibels == whole and curve.points[0].modulated == len(scales.modulated)
    chosen = curve.points[curve.chosen]
    # What the curve says of the chosen scales is what they are.
    assert trials.mean_decibels(best) == chosen.decibels >= whole - 1.0
    assert chosen.microseconds == pytest.approx(costs.predict({n: v.mode for n, v in best.layers.items()}))
    assert chosen.state_bytes == 2 * sum(state_elements(best, tiny.network).values()) and chosen.modulated == len(
        best.modulated
    )
    times = [point.microseconds for point in curve.points]
    assert times == sorted(times, reverse=True) and len(times) >= 8
    # No mixture that was tried is faster and good enough.
    assert all(point.decibels < whole - 1.0 for point in curve.points[curve.chosen + 1 :])
    assert best.rows.multipliers.shape == (len(best.rows), len(best.modulated))

    path = tmp_path / "scales.safetensors"
    save_scales(path, best)
    again = load_scales(path, tiny.network)
    assert again.curve == curve and again.without_modulation().curve is None
    print_table(again, tiny.network)
    text = capsys.readouterr().out
    assert "chosen" in text and f"{chosen.decibels:.2f}" in text and "modelled" in text
    assert save_plots(again, tmp_path)[-1].name == "modes.png"
    damaged = replace(best, curve=replace(curve, chosen=99))
    save_scales(path, damaged)
    with pytest.raises(InputError, match="damaged curve"):
        load_scales(path)
    assert curve_to_dict(None) is None
    # Earlier versions did not say what a step takes, and times of passes would be taken for it.
    earlier = curve_to_dict(curve)
    for point in earlier["points"]:
        del point["passes"]
    assert curve_from_dict(earlier, "a file") is None and curve_from_dict(curve_to_dict(curve), "a file") == curve


def test_a_change_that_loses_too_much_is_left_out_and_those_after_it_are_tried():
    """Of six changes the third and its layer's next corner cannot be made, and the last two cannot be made together."""
    ordered = [Change(layer, Mode.INT8, saved=1.0, added=0.1) for layer in "abc"]
    ordered += [Change("c", Mode.FLOAT, saved=1.0, added=0.2), *(Change(n, Mode.INT8, saved=1.0, added=0.3) for n in "de")]
    measured = []

    def measure(made):
        measured.append(made)
        return 30.0 if 2 in made or 3 in made or {4, 5} <= set(made) else 40.0

    _try_further(measure, ordered, 2, least=35.0)
    assert measured == [(0, 1, 2), (0, 1, 4), (0, 1, 4, 5)]
    many = [Change(str(index), Mode.INT8, saved=1.0, added=0.1) for index in range(40)]
    measured.clear()
    _try_further(lambda made: measured.append(made) or 0.0, many, 1, least=35.0)
    assert measured == [(0, index) for index in range(1, 1 + MOST_LEFT_OUT)]


def test_a_mixture_is_judged_by_all_of_its_images(trials, tiny):
    """One image that is bad with any modes hides from a PSNR of all together what becomes of the others."""
    scales = tiny.scales(act_bits=8)
    found, exact = trials.images_of(scales), trials._reference
    each = [psnr(found[i : i + 1], exact[i : i + 1]) for i in range(len(found))]
    assert trials.mean_decibels(scales) == pytest.approx(sum(each) / len(each))
    assert trials.mean_decibels(scales) > trials.decibels(scales)
    unusable = {name: replace(layer, residual_scale=float("nan")) for name, layer in scales.layers.items()}
    assert trials.mean_decibels(replace(scales, layers=unusable)) == -MOST_DECIBELS


def test_what_a_layer_adds_is_its_own_rounding_and_nothing_that_others_round(alone, tiny):
    """The others' rounding would move with any change, by more than this."""
    scales = tiny.scales(act_bits=8)
    seen = {}

    class Watched:
        network = alone.network
        images_of, mean_decibels = alone.images_of, alone.mean_decibels

        def difference(self, changed, layer, exact):
            seen[layer] = alone.difference(changed, layer, exact)
            return seen[layer]

    base = {name: layer.mode for name, layer in scales.layers.items()}
    costs = ModeCosts("here", 1, 99.0, base=base, added={name: {Mode.INT8: -1.0, Mode.FLOAT: -0.5} for name in base})
    search(alone, Watched(), scales, Goal(costs, max_loss=1000.0))
    assert set(seen) == set(scales.modulated)  # in float a layer rounds nothing
    plain = with_modes(scales, dict.fromkeys(scales.modulated, Mode.INT8))
    parts = tiny.network, tiny.checkpoint.params, plain
    exact = alone.sample(SimDenoiser(*parts, act_quant=False))
    for name, added in seen.items():
        only = alone.sample(SimDenoiser(*parts, act_quant=(name,)))
        assert added == pytest.approx(np.square(only.astype(np.float64) - exact).mean())
    # Independent roundings add up.
    whole = np.square(alone.sample(SimDenoiser(*parts)).astype(np.float64) - exact).mean()
    assert 0.5 * whole < sum(seen.values()) < 2 * whole


def test_a_layer_in_float_rounds_nothing_and_is_changed_first(alone, tiny):
    """It saves half of what the other layer saves without state."""
    scales = tiny.scales(act_bits=8)
    floating, integer = scales.modulated[:2]
    base = {name: layer.mode for name, layer in scales.layers.items()}
    added = {name: {} for name in base} | {floating: {Mode.FLOAT: -0.5}, integer: {Mode.INT8: -1.0}}
    best, _ = search(alone, alone, scales, Goal(ModeCosts("here", 1, 99.0, base=base, added=added), max_loss=1000.0))
    assert [point.microseconds for point in best.curve.points] == pytest.approx([99.0, 98.5, 97.5])


def test_what_loses_too_much_on_other_images_is_not_chosen(trials, alone, tiny):
    """On few images some mixture is always lucky."""
    scales = tiny.scales(act_bits=8)
    costs = modelled_costs(tiny.network, scales)
    lucky, _ = search(trials, alone, scales, Goal(costs, max_loss=1000.0))

    class Others:
        """Loses 10 dB where less than half of the layers have state."""

        def mean_decibels(self, mixed):
            return 50.0 if len(mixed.modulated) >= len(scales.modulated) / 2 else 40.0

    best, _ = search(trials, alone, scales, Goal(costs, max_loss=1000.0), Others())
    assert best.modulated == lucky.modulated  # 10 dB are allowed
    # What is allowed on the trial images is refused on the others.
    generous = max(point.decibels for point in lucky.curve.points) - min(point.decibels for point in lucky.curve.points)
    best, _ = search(trials, alone, scales, Goal(costs, max_loss=min(generous + 0.1, 9.0)), Others())
    count = [point.modulated for point in best.curve.points]
    assert len(best.modulated) >= len(scales.modulated) / 2 > len(lucky.modulated)
    assert best.curve.points[best.curve.chosen].modulated == len(best.modulated)
    assert len(best.modulated) == min(n for n in count if n >= len(scales.modulated) / 2)
    # Where nothing holds, all state is kept.
    whole, _ = search(trials, alone, scales, Goal(costs, max_loss=0.0), Others())
    assert trials.mean_decibels(whole) >= trials.mean_decibels(scales)


def test_any_loss_takes_all_state_that_costs_time(alone, tiny):
    scales = tiny.scales(act_bits=8)
    base = {name: layer.mode for name, layer in scales.layers.items()}
    costs = ModeCosts("here", 1, 99.0, base=base, added={name: {Mode.INT8: -1.0, Mode.FLOAT: 2.0} for name in base})
    generous, _ = search(alone, alone, scales, Goal(costs, max_loss=1000.0))
    assert not generous.modulated and generous.rows.warmup == 0
    assert not generous.dither  # nothing to warm up, nothing to offset


def test_the_best_modes_for_a_speed(alone, tiny):
    scales = tiny.scales(act_bits=8)
    costs = modelled_costs(tiny.network, scales)
    savings = [saved for _, _, saved in possible_changes(scales, costs)]
    fastest, passes = costs.whole - sum(savings), len(scales.rows) / len(tiny.timesteps)
    limit = (costs.whole + fastest) / 2 * passes
    best, _ = search(alone, alone, scales, Goal(costs, max_loss=0.0, microseconds=limit))
    chosen = best.curve.points[best.curve.chosen]
    fast = [point for point in best.curve.points if point.step_microseconds <= limit]
    assert chosen in fast and chosen.decibels == max(point.decibels for point in fast)
    # The one with as few changes as will do was tried.
    assert fast[0].modulated and fast[0].step_microseconds > limit - max(savings) * passes
    with pytest.raises(InputError, match="no mixture of modes takes"):
        search(alone, alone, scales, Goal(costs, max_loss=0.0, microseconds=fastest * 0.99))


def test_a_step_has_its_share_of_the_warm_up_passes(alone, tiny):
    """Here two passes warm six steps up, and only without any state there are none."""
    scales = tiny.scales(act_bits=8)
    base = {name: layer.mode for name, layer in scales.layers.items()}
    # By itself a pass is faster with state, so that no change of one layer saves anything.
    costs = ModeCosts("here", 1, 100.0, base=base, added={name: {Mode.INT8: 0.1} for name in base})
    without = 100.0 + 0.1 * len(scales.modulated)
    best, _ = search(alone, alone, scales, Goal(costs, max_loss=1000.0))
    assert not best.modulated and len(best.rows) == len(tiny.timesteps)
    state, bare = best.curve.points
    assert (state.microseconds, state.passes, state.modulated) == (100.0, len(scales.rows) / 6, len(scales.modulated))
    assert state.step_microseconds == pytest.approx(
        100.0 * 8 / 6
    ) and bare.step_microseconds == bare.microseconds == pytest.approx(without)
    fast, _ = search(alone, alone, scales, Goal(costs, max_loss=0.0, microseconds=without))
    assert not fast.modulated
    with pytest.raises(
        InputError, match=rf"takes {without - 0.1:.2f} us an image and step on here; the fastest takes {without:.2f}"
    ):
        search(alone, alone, scales, Goal(costs, max_loss=0.0, microseconds=without - 0.1))
    # Where nothing says what the other layers take without state, all of a step is warmed up.
    one = replace(costs, added={name: {} for name in base} | {scales.modulated[0]: {Mode.INT8: -1.0}})
    with pytest.raises(InputError, match=r"takes 120\.00 us an image and step on here; the fastest takes 132\.00"):
        search(alone, alone, scales, Goal(one, max_loss=0.0, microseconds=120.0))
    # What is slower even so is not tried, and what loses too much not taken.
    slow = replace(costs, added={name: {Mode.INT8: 50.0} for name in base})
    assert len(search(alone, alone, scales, Goal(slow, max_loss=1000.0))[0].curve.points) == 1
    kept, _ = search(alone, alone, scales, Goal(costs, max_loss=0.0))
    assert kept.modulated == scales.modulated and len(kept.curve.points) == 2


def test_without_state_layers_go_to_float_first_and_then_to_int8(alone, tiny):
    scales = tiny.scales(act_bits=8)
    floating, slower = scales.modulated[:2]
    base = {name: layer.mode for name, layer in scales.layers.items()}
    added = {name: {Mode.INT8: 0.1} for name in base}
    added |= {floating: {Mode.FLOAT: -1.0, Mode.INT8: -2.0}, slower: {Mode.FLOAT: 0.5, Mode.INT8: 0.1}}
    costs = ModeCosts("here", 1, 100.0, base=base, added=added)

    class Judge:
        """Layers in float are good, layers without state are worth `int8`."""

        network = alone.network
        images_of, difference = alone.images_of, alone.difference

        def __init__(self, int8):
            self.int8 = int8

        def mean_decibels(self, mixed):
            return 40.0 if mixed.modulated or mixed.layers[floating].mode == Mode.FLOAT else self.int8

    def chosen(int8):
        best, _ = search(Judge(int8), alone, scales, Goal(costs, max_loss=1.0), Judge(int8))
        assert not best.modulated and best.layers[slower].mode == Mode.INT8
        return best.layers[floating].mode

    assert chosen(39.5) == Mode.INT8 and chosen(30.0) == Mode.FLOAT
    # A layer that was in float goes to INT8 where that is faster, too.
    before = with_modes(scales, {floating: Mode.FLOAT})
    base = {name: layer.mode for name, layer in before.layers.items()}
    costs = replace(costs, base=base, added=added | {floating: {Mode.INT8: -5.0}})
    best, _ = search(Judge(40.0), alone, before, Goal(costs, max_loss=1000.0), Judge(40.0))
    assert not best.modulated and best.layers[floating].mode == Mode.INT8


def test_the_best_modes_for_a_speed_may_be_faster_than_it_asks(alone, tiny):
    """Where state spoils the image, more layers without it are better."""
    scales = tiny.scales(act_bits=8)
    costs = modelled_costs(tiny.network, scales)

    class Reversed:
        """Every layer with state takes a decibel."""

        network = alone.network
        images_of, difference = alone.images_of, alone.difference

        def mean_decibels(self, mixed):
            return 50.0 - len(mixed.modulated)

    fastest = costs.whole - sum(saved for _, _, saved in possible_changes(scales, costs))
    limit = (costs.whole + fastest) / 2 * len(scales.rows) / len(tiny.timesteps)
    best, _ = search(Reversed(), alone, scales, Goal(costs, max_loss=0.0, microseconds=limit))
    assert sum(point.step_microseconds <= limit for point in best.curve.points) > 2
    assert best.curve.points[best.curve.chosen] == best.curve.points[-1]
    assert best.curve.points[-1].microseconds == pytest.approx(fastest)


def test_far_better_modes_that_take_longer_are_said():
    def advice(decibels, *, baseline=None, chosen=2):
        points = tuple(ModePoint(9 - i, 102.5 - i, 0, db, passes=1.0) for i, db in enumerate(decibels))
        return ModeCurve("here", 1, baseline, points, chosen=chosen).advice()

    what = "8 layers with state are 6.0 dB better and take 1.0% longer; --target-speed "
    assert what in advice((11.0, 19.0, 13.0)) and "asks for such modes, by costs that have" in advice((11.0, 19.0, 13.0))
    # 2 x 101.5 us: no more than the speed that those modes have.
    assert f"{what}1.99 asks" in advice((11.0, 19.0, 13.0), baseline=202.9)
    # Not far better, the best ones already, or faster and refused on other images.
    assert advice((11.0, 15.9, 13.0)) is advice((11.0, 19.0, 13.0), chosen=1) is advice((11.0, 9.0, 19.0), chosen=1) is None


def test_costs_by_which_a_pass_takes_no_time_are_refused(alone, tiny):
    scales = tiny.scales(act_bits=8)
    base = {name: layer.mode for name, layer in scales.layers.items()}
    costs = ModeCosts("here", 1, 2.0, base=base, added={name: {Mode.INT8: -1.0} for name in base})
    with pytest.raises(InputError, match=r"could take -\d+\.00 us an image, which cannot be; measure them again"):
        search(alone, alone, scales, Goal(costs, max_loss=1000.0))


def test_costs_of_other_modes_are_refused(tiny):
    scales = tiny.scales()
    base = {name: layer.mode for name, layer in scales.layers.items()}
    costs = ModeCosts("here", 1, 10.0, base=base, added={name: {} for name in base})
    with pytest.raises(InputError, match="do not have layer"):
        costs.predict(base | {scales.modulated[0]: Mode.INT8})


def test_a_layer_that_loses_its_state_loses_its_column(tiny):
    scales = tiny.scales()
    only = with_modes(scales, {name: Mode.INT8 for name in scales.modulated if name != "conv_in"})
    assert only.modulated == ("conv_in",)
    column = scales.modulated.index("conv_in")
    np.testing.assert_array_equal(only.rows.multipliers[:, 0], scales.rows.multipliers[:, column])
