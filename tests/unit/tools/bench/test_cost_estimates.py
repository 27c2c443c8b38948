"""Costs of layers from noisy times of passes: what is found against what times were made of."""

import numpy as np
import pytest

from modiff_trt.tools.bench.cost_estimates import QUIET, Kind, Together, estimate

WHOLE = 100.0


def observed(generator, costs, counts, modelled, *, noise, offset):
    """(kinds, all together, differences of unchanged passes) of layers of these true costs."""
    seen = costs * counts + offset + generator.normal(0, noise, len(costs))
    kinds = [Kind(int(n), m, float(d)) for n, m, d in zip(counts, modelled, seen, strict=True)]
    again = offset + generator.normal(0, noise, 4)
    return kinds, all_of(kinds, float(costs @ counts + offset + generator.normal(0, noise))), list(again)


def all_of(kinds, difference):
    """The pass in which all state is gone."""
    return [Together([kind.modelled is not None for kind in kinds], difference)]


def test_without_noise_the_costs_are_found_whatever_bytes_say():
    costs, counts = np.asarray([-0.9, -0.3, -2.0, 0.4]), np.asarray([4, 1, 2, 8])
    kinds = [Kind(int(n), m, float(n * c + 0.7)) for n, c, m in zip(counts, costs, (-0.4, -0.2, -0.9, -0.1), strict=True)]
    found = estimate(kinds, all_of(kinds, float(costs @ counts + 0.7)), [0.7, 0.7, 0.7], WHOLE)
    np.testing.assert_allclose(found, costs, atol=2 * QUIET * WHOLE)


def test_noise_as_large_as_the_costs_is_weighed():
    """Layers that cost twice what bytes say, give or take a fifth: what is found is twice as near to the truth as a pass's own
    difference, and so is what it says of mixtures."""
    generator, of_layers, of_mixtures = np.random.default_rng(0), [], []
    for _ in range(40):
        modelled = -generator.uniform(0.02, 0.4, 12)
        counts = generator.integers(1, 5, 12)
        costs = 2 * modelled * generator.uniform(0.8, 1.2, 12)
        kinds, together, again = observed(generator, costs, counts, modelled, noise=0.8, offset=0.5)
        found = estimate(kinds, together, again, WHOLE)
        alone = np.asarray([kind.difference / kind.count for kind in kinds])
        mixture = counts * (generator.random(12) < 0.5)
        off = np.stack([found - costs, alone - costs])
        of_layers.append(np.square(off).mean(1))
        of_mixtures.append(np.square(off @ mixture))
    for errors in (of_layers, of_mixtures):
        by_estimate, by_difference = np.sqrt(np.mean(errors, axis=0))
        assert 2 * by_estimate < by_difference


def test_of_passes_that_say_nothing_the_one_without_state_is_shared_out_by_bytes():
    """Single passes scatter by more than they differ, instances are 5 us slower by themselves, and all state is worth 20."""
    modelled = np.asarray([-1.0, -2.0, -4.0, -3.0])
    kinds = [Kind(1, float(m), 5.0 + off) for m, off in zip(modelled, (0.5, -1.0, 1.0, -0.5), strict=True)]
    found = estimate(kinds, all_of(kinds, 5.0 - 20.0), [5.0 + off for off in (4.0, -4.0, 4.0, -4.0)], WHOLE)
    np.testing.assert_allclose(found / found.sum(), modelled / modelled.sum(), atol=0.1)
    assert -20 < found.sum() < -13


def test_what_bytes_do_not_tell_is_what_was_seen():
    kinds = [Kind(2, -1.0, -6.0), Kind(2, None, 2.0), Kind(5, None, 3.0)]
    np.testing.assert_allclose(estimate(kinds, all_of(kinds, -6.0), [0.0, 0.0], WHOLE), [-3.0, 1.0, 0.6], atol=0.05)


def test_a_kind_that_bytes_call_free_may_cost_something():
    kinds = [Kind(1, -1.0, -1.0), Kind(8, 0.0, -8.0)]
    found = estimate(kinds, all_of(kinds, -9.0), [0.0, 0.0], WHOLE)
    assert found[1] == pytest.approx(-0.9, abs=0.15)


def test_where_state_costs_nothing_noise_is_not_taken_for_a_gain():
    """Without state these passes came out slower by half of their scatter: nothing is expected then, and little remains."""
    kinds = [Kind(1, modelled, 0.5) for modelled in (-0.1, -0.4, -0.2)]
    found = estimate(kinds, all_of(kinds, 0.5), [1.0, -1.0, 0.9, -0.9], WHOLE)
    assert np.abs(found).max() < 0.1


def test_networks_without_state_have_costs_too():
    found = estimate([Kind(3, None, 6.0)], [], [0.0, 0.1], WHOLE)
    assert found == pytest.approx([2.0], abs=0.1)


def test_what_few_instances_differ_by_is_not_added_up_over_all_layers():
    """On a CPU four unchanged instances took 2 to 15 % more by chance, and 55 kinds of layers seemed to save as much each."""
    kinds = [Kind(1, None, 1.0) for _ in range(55)]
    again = [6.0, 15.0, 2.0, 12.0]
    alone = estimate(kinds, [], again, WHOLE)
    pinned = estimate(kinds, [Together([True] * 55, -5.0)], again, WHOLE)
    assert alone.sum() < -15
    assert pinned.sum() == pytest.approx(-5.0 - 1.0, abs=5.0)


def test_layers_that_share_a_launch_leave_each_ones_own_cost():
    """All together they save 4 that none saves alone."""
    kinds = [Kind(1, None, 2.0) for _ in range(10)]
    found = estimate(kinds, [Together([True] * 10, 16.0)], [0.0, 0.1, 0.0, -0.1], WHOLE)
    np.testing.assert_allclose(found, 2.0, atol=0.35)
