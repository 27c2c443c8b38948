import numpy as np
import pytest

from modiff_trt.export.calibration.residuals import refit
from modiff_trt.export.calibration.trials import (
    Trials,
    Verdict,
    judge,
    search_modes,
    search_rows,
    search_scales,
    state_traffic,
    with_modes,
)
from modiff_trt.tools.report.inspecting import print_table, save_plots, state_elements


@pytest.fixture(scope="module")
def trials(tiny):
    return Trials(tiny.network, tiny.checkpoint, tiny.timesteps, tiny.trajectories.solver, images=3, seed=2, device="cpu")


def test_the_verdict_names_what_limits_an_image(trials, tiny):
    fine = judge(trials, tiny.scales(weight_bits=4))
    assert fine.weights_limit and fine.weights_alone == pytest.approx(fine.decibels, abs=3)
    coarse = judge(trials, tiny.scales(act_bits=3))
    assert not coarse.weights_limit and coarse.weights_alone > coarse.decibels + 3
    assert coarse.decibels == trials.decibels(tiny.scales(act_bits=3))
    # Half of the squared error is 3.01 dB.
    assert Verdict(40.0, 43.0, seconds=1.0).weights_limit and not Verdict(40.0, 43.02, seconds=1.0).weights_limit


def test_searched_rows_are_never_worse_on_the_trials(trials, tiny):
    scales = tiny.scales(act_bits=4)
    lines = []
    best = search_rows(trials, scales, lines.append)
    assert trials.decibels(best) >= trials.decibels(scales)
    assert any("margin 1.0, attempt 2" in line for line in lines)
    assert any("margin 0.35, attempt 1" in line for line in lines)
    warmup = best.rows.warmup
    assert best.rows.multipliers.shape == scales.rows.multipliers.shape
    assert (best.rows.multipliers[:warmup] >= best.rows.multipliers[warmup]).all()


def test_searched_scales_are_never_worse_on_the_trials_and_say_what_they_clip(trials, tiny):
    scales = tiny.scales(act_bits=3)
    lines = []
    half = {name: scales.layers[name].residual_scale / 2 for name in scales.modulated}
    best = search_scales(trials, scales, {0.9999: half, 0.5: {n: s / 50 for n, s in half.items()}}, lines.append)
    assert trials.decibels(best) >= trials.decibels(scales)
    assert len(lines) == 5 and "0.9999" in lines[1] and "without dither" in lines[3]
    assert lines[4].startswith("scales: kept ") and f"{trials.decibels(best):.2f} dB" in lines[4]
    lines.clear()
    wide = refit(scales, {name: 8 * scales.layers[name].residual_scale for name in scales.modulated})
    best = search_scales(trials, wide, {0.999: {n: scales.layers[n].residual_scale for n in scales.modulated}}, lines.append)
    assert lines[-1].startswith("scales: kept percentile 0.999") and f"{trials.decibels(best):.2f} dB" in lines[-1]
    decibels = [float(line.split()[-2]) for line in lines]
    assert decibels[-1] == max(decibels)


def test_residuals_are_those_that_the_quantized_network_rounds(trials, tiny):
    scales = tiny.scales(act_bits=8)
    _, seen = trials.residuals(scales)
    assert seen.shape == scales.rows.multipliers.shape and (seen > 0).all()
    assert scales.modulated[0] == "conv_in"
    noise = trials._noise
    step = scales.layers["conv_in"].scale
    # the first pass meets x_T itself, less the dither
    assert seen[0, 0] == pytest.approx(np.abs(noise).max(), abs=step)


def test_modes_give_up_state_within_the_allowed_loss(trials, tiny):
    scales = tiny.scales(act_bits=8)
    calls = []
    best, curve = search_modes(trials, scales, 1.0, lambda line: None, lambda: calls.append(1))
    assert len(calls) == len(scales.modulated)
    assert trials.decibels(best) >= trials.decibels(scales) - 1.0
    assert state_traffic(best, tiny.network) <= state_traffic(scales, tiny.network)
    assert [p.stateless for p in curve] == sorted(p.stateless for p in curve)
    assert best.rows.multipliers.shape == (len(best.rows), len(best.modulated))
    generous, _ = search_modes(trials, scales, 1000.0, lambda line: None, lambda: None)
    assert state_traffic(generous, tiny.network) == 0 and not generous.modulated
    assert generous.rows.warmup == 0 and not generous.dither  # nothing to warm up, nothing to offset


def test_traffic_counts_both_arrays_in_and_out(tiny):
    scales = tiny.scales()
    only = with_modes(scales, {name: "int8" for name in scales.modulated if name != "conv_in"})
    assert state_traffic(only, tiny.network) == 4 * (3 * 144 + 32 * 144)
    assert only.modulated == ("conv_in",)
    column = scales.modulated.index("conv_in")
    np.testing.assert_array_equal(only.rows.multipliers[:, 0], scales.rows.multipliers[:, column])


def test_inspect_shows_every_layer_and_draws(tiny, tmp_path, capsys):
    scales = tiny.scales()
    print_table(scales, tiny.network)
    text = capsys.readouterr().out
    assert all(spec.name in text for spec in tiny.network.layers)
    assert f"{sum(state_elements(scales, tiny.network).values()):,} elements" in text
    for path in save_plots(scales, tmp_path):
        assert path.stat().st_size > 10_000
