"""Costs of layers from noisy times of passes: what is found against what times were made of."""

import numpy as np
import pytest

from modiff_trt.tools.bench.cost_estimates import Kind, Passes, Whole, estimate

WHOLE = Whole(100.0, 50.0, 40)


def alone(differences, stateless=False):
    """Each kind changed by itself, in order."""
    return [Passes(row, stateless, float(d)) for row, d in zip(np.eye(len(differences), dtype=bool), differences, strict=True)]


def again(differences, kinds, stateless=False):
    return [Passes([False] * len(kinds), stateless, float(d)) for d in differences]


def of_state(modelled, counts=None):
    return [Kind(int(n), float(m), abs(float(m)), True) for m, n in zip(modelled, counts or [1] * len(modelled), strict=True)]


def all_of(kinds, difference, stateless=False):
    return [Passes([True] * len(kinds), stateless, float(difference))]


def test_without_noise_the_costs_are_found_whatever_bytes_say():
    costs, counts = np.asarray([-0.9, -0.3, -2.0, 0.1]), [4, 1, 2, 8]
    kinds = of_state((-0.4, -0.2, -0.9, -0.1), counts)
    seen = alone(costs * counts + 0.7) + all_of(kinds, costs @ counts + 0.7) + again([0.7, 0.7, 0.7], kinds)
    found, of_instance = estimate(kinds, seen, WHOLE)
    np.testing.assert_allclose(found, costs, atol=0.2)
    assert of_instance == pytest.approx(0.7, abs=0.2)


def test_noise_as_large_as_the_costs_is_weighed():
    """Layers that cost twice what bytes say, give or take a fifth: what is found is twice as near to the truth as a pass's own
    difference, and so is what it says of mixtures."""
    generator, of_layers, of_mixtures = np.random.default_rng(0), [], []
    for _ in range(40):
        modelled = -generator.uniform(0.02, 0.4, 12)
        counts = generator.integers(1, 5, 12)
        costs = 2 * modelled * generator.uniform(0.8, 1.2, 12)
        kinds = of_state(modelled, counts.tolist())
        differences = costs * counts + 0.5 + generator.normal(0, 0.8, 12)
        unchanged = again(0.5 + generator.normal(0, 0.8, 4), kinds)
        many = all_of(kinds, costs @ counts + 0.5 + generator.normal(0, 0.8))
        found, _ = estimate(kinds, alone(differences) + many + unchanged, WHOLE)
        mixture = counts * (generator.random(12) < 0.5)
        off = np.stack([found - costs, differences / counts - costs])
        of_layers.append(np.square(off).mean(1))
        of_mixtures.append(np.square(off @ mixture))
    for errors in (of_layers, of_mixtures):
        by_estimate, by_difference = np.sqrt(np.mean(errors, axis=0))
        assert 2 * by_estimate < by_difference


def test_the_fastest_of_many_noisy_choices_is_not_too_good_to_be_true():
    """Layers that are slower in float, each by less than a pass scatters. Those that seem faster seem so by chance."""
    generator, promised, seemed, came = np.random.default_rng(1), 0.0, 0.0, 0.0
    for _ in range(20):
        modelled = generator.uniform(0.01, 0.1, 100)
        costs = 2 * modelled * generator.uniform(0.5, 1.5, 100)
        kinds = [Kind(1, float(m), 2 * float(m), False) for m in modelled]
        differences = costs + generator.normal(0, 0.3, 100)
        seen = alone(differences, stateless=True) + all_of(kinds, costs.sum(), stateless=True)
        found, _ = estimate(kinds, seen + again(generator.normal(0, 0.3, 3), kinds, stateless=True), WHOLE)
        promised += found[found < 0].sum()
        seemed += differences[differences < 0].sum()
        came += costs[found < 0].sum()
    assert came >= 0 and seemed / 20 < -5
    assert promised > seemed / 8


def test_of_passes_that_say_nothing_the_one_without_state_is_shared_out_by_bytes():
    """Single passes scatter by more than they differ, instances are 5 us slower by themselves, and all state is worth 20."""
    modelled = np.asarray([-1.0, -2.0, -4.0, -3.0])
    kinds = of_state(modelled)
    unchanged = again([5.0 + off for off in (4.0, -4.0, 4.0, -4.0)], kinds)
    found, _ = estimate(kinds, alone([5.5, 4.0, 6.0, 4.5]) + all_of(kinds, 5.0 - 20.0) + unchanged, WHOLE)
    np.testing.assert_allclose(found / found.sum(), modelled / modelled.sum(), atol=0.1)
    assert -20 < found.sum() < -10


def test_passes_are_compared_with_the_one_that_they_were_timed_beside():
    """Instances are 3 us slower than the pass with state, and 2 us faster than the one without."""
    kinds = [*of_state((-1.0, -1.0), [2, 2]), Kind(2, 1.0, 2.0, False), Kind(2, 1.0, 2.0, False)]
    rows = np.eye(4, dtype=bool)
    with_state = [Passes(row, False, -4.0 + 3.0) for row in rows[:2]]
    without = [Passes(row, True, 4.0 - 2.0) for row in rows[2:]]
    many = [Passes([True, True, False, False], False, -8.0 + 3.0), Passes([False, False, True, True], True, 8.0 - 2.0)]
    unchanged = again([3.0, 3.1, 2.9], kinds) + again([-2.0, -2.1, -1.9], kinds, stateless=True)
    found, _ = estimate(kinds, with_state + without + many + unchanged, WHOLE)
    np.testing.assert_allclose(found, [-2.0, -2.0, 2.0, 2.0], atol=0.1)


def test_a_device_may_be_faster_in_the_mode_that_does_more():
    """A processor without INT8 products: float is faster, the more so the larger the layer."""
    kinds = [Kind(1, modelled, 2 * modelled, False) for modelled in (1.0, 2.0, 4.0)]
    seen = alone([-2.0, -4.0, -8.0], stateless=True) + all_of(kinds, -14.0, stateless=True)
    found, _ = estimate(kinds, seen + again([0.1, -0.1], kinds, stateless=True), WHOLE)
    np.testing.assert_allclose(found, [-2.0, -4.0, -8.0], atol=0.1)


def test_a_kind_that_bytes_call_free_may_cost_something():
    kinds = of_state((-1.0, 0.0), [1, 8])
    found, _ = estimate(kinds, alone([-1.0, -3.2]) + all_of(kinds, -4.2) + again([0.0, 0.0], kinds), WHOLE)
    assert found[1] == pytest.approx(-0.4, abs=0.1)


def test_where_state_costs_nothing_noise_is_not_taken_for_a_gain():
    """Without state these passes came out slower by half of their scatter: nothing is expected then, and little remains."""
    kinds = of_state((-0.1, -0.4, -0.2))
    found, _ = estimate(kinds, alone([0.5, 0.5, 0.5]) + all_of(kinds, 0.5) + again([1.0, -1.0, 0.9, -0.9], kinds), WHOLE)
    assert np.abs(found).max() < 0.1


def test_networks_without_state_have_costs_too():
    kinds = [Kind(3, 1.0, 2.0, False)]
    found, _ = estimate(kinds, alone([6.0], stateless=True) + again([0.0, 0.1], kinds, stateless=True), WHOLE)
    assert found == pytest.approx([2.0], abs=0.1)


def test_what_few_instances_differ_by_is_not_added_up_over_all_layers():
    """On a CPU four unchanged instances took 2 to 15 % more by chance, and 55 kinds of layers seemed to save as much each."""
    kinds = [Kind(1, 0.1, 4.0, False) for _ in range(55)]
    unchanged = again([6.0, 15.0, 2.0, 12.0], kinds)
    singly, _ = estimate(kinds, alone([1.0] * 55) + unchanged, WHOLE)
    pinned, _ = estimate(kinds, alone([1.0] * 55) + all_of(kinds, -5.0) + unchanged, WHOLE)
    assert singly.sum() < -15
    assert pinned.sum() == pytest.approx(-5.0 - 1.0, abs=5.0)


def test_layers_that_share_a_launch_leave_each_ones_own_cost():
    """All together they save 4 that none saves alone."""
    kinds = [Kind(1, 1.0, 3.0, False) for _ in range(10)]
    found, _ = estimate(kinds, alone([2.0] * 10) + all_of(kinds, 16.0) + again([0.0, 0.1, 0.0, -0.1], kinds), WHOLE)
    np.testing.assert_allclose(found, 2.0, atol=0.35)
