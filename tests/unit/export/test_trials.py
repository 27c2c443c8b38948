import numpy as np
import pytest

from modiff_trt.export.calibration.residuals import refit
from modiff_trt.export.calibration.trials import (
    Trials,
    Verdict,
    judge,
    search_rows,
    search_scales,
)
from modiff_trt.tools.report.inspecting import print_table, save_plots, state_elements


@pytest.fixture(scope="module")
def trials(tiny):
    return Trials(tiny.network, tiny.checkpoint, tiny.timesteps, tiny.trajectories.solver, images=3, seed=2, device="cpu")


def test_the_verdict_names_what_limits_an_image(trials, tiny):
    fine = judge(trials, tiny.scales(weight_bits=4))
    assert fine.stateless == trials.decibels(tiny.scales(weight_bits=4).without_modulation())
    assert judge(trials, tiny.scales(method="qdiff")).stateless is None
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


@pytest.mark.parametrize("stopped", [1, 4])
def test_a_search_goes_on_where_it_was_stopped(trials, tiny, tmp_path, monkeypatch, stopped):
    scales, runs = tiny.scales(act_bits=4), []
    expected, verdict = search_rows(trials, scales, lambda line: None), judge(trials, scales)
    real = Trials.score

    def counted(self, denoiser):
        if len(runs) == stopped:
            runs.append("stopped")
            raise KeyboardInterrupt
        runs.append(1)
        return real(self, denoiser)

    monkeypatch.setattr(Trials, "score", counted)

    def fresh(images=3):
        solver = tiny.trajectories.solver
        part = tmp_path / "t.part"
        return Trials(tiny.network, tiny.checkpoint, tiny.timesteps, solver, images=images, seed=2, device="cpu", kept=part)

    with pytest.raises(KeyboardInterrupt):
        search_rows(fresh(), scales, lambda line: None)
    lines = []
    found = search_rows(fresh(), scales, lines.append)
    np.testing.assert_array_equal(found.rows.multipliers, expected.rows.multipliers)
    assert len(runs) == len(lines)  # a line for each trial and one at the end; one trial was cut off, and none was run twice
    # A verdict from the file has the trial's own time, not that of reading it.
    assert (judge(fresh(), scales).decibels, judge(fresh(), scales).weights_alone) == (verdict.decibels, verdict.weights_alone)
    count = len(runs)
    again = judge(fresh(), scales)
    assert len(runs) == count and again.seconds > 0 and again == judge(fresh(), scales)
    # Other images are other trials.
    assert fresh(images=2).decibels(scales) != verdict.decibels and len(runs) == count + 1


def test_searched_scales_are_never_worse_on_the_trials_and_say_what_they_clip(trials, tiny):
    scales = tiny.scales(act_bits=3)
    lines = []
    half = {name: scales.layers[name].residual_scale / 2 for name in scales.modulated}
    best = search_scales(trials, scales, {0.9999: half, 0.5: {n: s / 50 for n, s in half.items()}}, lines.append)
    assert trials.decibels(best) >= trials.decibels(scales)
    assert "0.9999" in lines[1] and "without dither" in lines[-2]
    assert lines[-1].startswith("scales: kept ") and f"{trials.decibels(best):.2f} dB" in lines[-1]
    lines.clear()
    wide = refit(scales, {name: 8 * scales.layers[name].residual_scale for name in scales.modulated})
    best = search_scales(trials, wide, {0.999: {n: scales.layers[n].residual_scale for n in scales.modulated}}, lines.append)
    assert lines[-1].startswith("scales: kept percentile 0.999") and f"{trials.decibels(best):.2f} dB" in lines[-1]
    decibels = [float(line.split()[-2]) for line in lines]
    assert decibels[-1] == max(decibels)


def test_grids_far_beyond_the_best_are_not_tried(trials, tiny):
    scales = tiny.scales(act_bits=8)
    fine = {name: scales.layers[name].residual_scale for name in scales.modulated}
    lines = []
    search_scales(trials, scales, {0.9999: {n: 100 * s for n, s in fine.items()}, 0.99: fine}, lines.append)
    assert any("0.9999" in line for line in lines) and not any("0.99:" in line for line in lines)
    # A little worse is no reason to stop.
    worse = {n: s / 100 for n, s in fine.items()}
    best = search_scales(trials, scales, {0.9999: worse, 0.99: {n: s / 2 for n, s in fine.items()}}, lines.append)
    assert trials.decibels(best) > trials.decibels(scales)
    assert lines[-1].startswith(("scales: kept percentile 0.99,", "scales: kept percentile 0.99:"))
    lines.clear()
    search_rows(trials, tiny.scales(act_bits=8), lines.append)
    # The third margin is far enough below the best; the fourth is left.
    assert [line.split()[2] for line in lines[1:-1]] == ["1.0,", "1.0,", "0.7,", "0.7,", "0.5,", "0.5,"]


def test_residuals_are_those_that_the_quantized_network_rounds(trials, tiny):
    scales = tiny.scales(act_bits=8)
    _, seen = trials.residuals(scales)
    assert seen.shape == scales.rows.multipliers.shape and (seen > 0).all()
    assert scales.modulated[0] == "conv_in"
    noise = trials._noise
    step = scales.layers["conv_in"].scale
    # the first pass meets x_T itself, less the dither
    assert seen[0, 0] == pytest.approx(np.abs(noise).max(), abs=step)


def test_inspect_shows_every_layer_and_draws(tiny, tmp_path, capsys):
    scales = tiny.scales()
    print_table(scales, tiny.network)
    text = capsys.readouterr().out
    assert all(spec.name in text for spec in tiny.network.layers)
    assert f"{sum(state_elements(scales, tiny.network).values()):,} elements" in text
    for path in save_plots(scales, tmp_path):
        assert path.stat().st_size > 10_000
