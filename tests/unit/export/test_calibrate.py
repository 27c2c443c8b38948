from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, ddim_state
from reference import ReferenceUNet

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import load_arrays, save_arrays
from modiff_trt.core.rows import modulated_rows
from modiff_trt.core.scales import SCHEMA, load_scales, save_scales
from modiff_trt.core.state_grid import units_a_scale, with_whole_steps
from modiff_trt.export.calibration import pipeline
from modiff_trt.export.calibration.biases import correct_biases
from modiff_trt.export.calibration.ranges import kept_ranges, measure_ranges, ranges_to_arrays
from modiff_trt.export.calibration.residuals import refit
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.calibration.trajectories import choose_steps, load_trajectories, save_trajectories
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.native.layers import build
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr


class Spy(ReferenceUNet):
    """The independent network, keeping the inputs of its convolutions."""

    def conv(self, name, x, **kw):
        self.inputs[name] = x
        return super().conv(name, x, **kw)

    def run(self, x, t):
        self.inputs = {}
        self(x, t)
        return self.inputs


def test_ranges_equal_an_independent_measurement(tiny):
    spy = Spy(ddim_state(tiny.checkpoint.params, 2), 32)
    trajectories = tiny.trajectories
    layer, key = "up_blocks.1.resnets.1.conv1", "up.0.block.1.conv1"
    qkv, q = "mid_block.attentions.0.to_qkv", "mid.attn_1.q"
    by_step = [spy.run(torch.from_numpy(x), t) for x, t in zip(trajectories.x, trajectories.timesteps, strict=True)]
    for name, conv in ((layer, key), (qkv, q)):
        activation = [float(s[conv].abs().max()) for s in by_step]
        residual = [0.0] + [float((b[conv] - a[conv]).abs().max()) for a, b in pairwise(by_step)]
        np.testing.assert_allclose(tiny.ranges[name].activation_max, activation, rtol=1e-4)
        np.testing.assert_allclose(tiny.ranges[name].residual_max, residual, rtol=1e-3)
        assert tiny.ranges[name].residual.absmax == pytest.approx(max(residual), rel=1e-3)


def test_ranges_do_not_depend_on_the_batch_size(tiny):
    one = measure_ranges(tiny.network, tiny.checkpoint.params, tiny.trajectories, 1)
    for name, ranges in tiny.ranges.items():
        np.testing.assert_allclose(one[name].activation_max, ranges.activation_max, rtol=1e-5)
        assert one[name].residual.absmax == pytest.approx(ranges.residual.absmax, rel=1e-4)


@pytest.mark.parametrize("stopped", [1, 3])
def test_ranges_go_on_after_an_interruption_to_the_same_bits(tiny, tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(pipeline, "KEEP_EVERY", 0.0)
    job = {"batch_size": 2, "device": "cpu", "part": tmp_path / "p"}
    whole = pipeline.measure(tiny.network, tiny.checkpoint, tiny.trajectories, **job | {"part": tmp_path / "whole"})
    real, written = pipeline.save_arrays, []

    def interrupted(*arguments):
        real(*arguments)
        written.append(1)
        if len(written) == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "save_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.measure(tiny.network, tiny.checkpoint, tiny.trajectories, **job)
    monkeypatch.setattr(pipeline, "save_arrays", lambda *arguments: written.append(1))
    found = pipeline.measure(tiny.network, tiny.checkpoint, tiny.trajectories, **job)
    assert len(written) == len(tiny.trajectories.chosen)  # no step twice
    for name, array in ranges_to_arrays(whole).items():
        np.testing.assert_array_equal(ranges_to_arrays(found)[name], array)
    scales = [make_scales(tiny.network, tiny.checkpoint, tiny.trajectories, ranges=r, recipe=Recipe()) for r in (whole, found)]
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file, made in zip(files, scales, strict=True):
        save_scales(file, correct_biases(tiny.network, tiny.checkpoint.params, made, whole if file == files[0] else found))
    assert files[0].read_bytes() == files[1].read_bytes()
    # Ranges of another network are not taken, nor those of another job.
    of_another = {name: array for name, array in ranges_to_arrays(whole).items() if not name.startswith("conv_out:")}
    assert kept_ranges(tiny.network, of_another) is None and kept_ranges(tiny.network, {}) is None
    written.clear()
    pipeline.measure(tiny.network, tiny.checkpoint, tiny.trajectories, **job | {"batch_size": 3})
    assert len(written) == len(tiny.trajectories.chosen)


def test_scales_follow_the_recipe(tiny):
    scales = tiny.scales(activation_method="minmax", act_bits=6)
    for name, layer in scales.layers.items():
        assert layer.activation_scale == pytest.approx(tiny.ranges[name].activation.absmax / (31 - layer.activation_zero_point))
        assert layer.residual_scale == pytest.approx(tiny.ranges[name].residual.absmax / 31)
        smaller = tiny.ranges[name].residual.absmax < tiny.ranges[name].activation.absmax
        assert layer.mode == ("modiff" if smaller else "int8")
        assert layer.scale == (layer.residual_scale if smaller else layer.activation_scale)


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_inputs_that_are_hardly_negative_have_a_low_zero_point(tiny, method, bits):
    scales = tiny.scales(method="qdiff", activation_method=method, act_bits=bits)
    silu = {spec.name for spec in tiny.network.layers if tiny.ranges[spec.name].activation_min > -0.2785}
    assert len(silu) > 10
    low = {name for name, layer in scales.layers.items() if layer.zero_point}
    assert len(low & silu) > 10
    for name, layer in scales.layers.items():
        assert layer.zero_point in (0, {8: -96, 6: -24, 4: -6}[bits])
        below = {8: 32, 6: 8, 4: 2}[bits]
        if layer.zero_point:
            assert tiny.ranges[name].activation_min >= -below * layer.scale  # nothing is clipped there
        elif method == "minmax":
            finer = tiny.ranges[name].activation.absmax / (2**bits - 1 - below)
            assert tiny.ranges[name].activation_min < -below * finer


def test_a_low_zero_point_is_of_plain_static_grids_alone(tiny):
    """Residuals have both signs, and a dynamic grid spans what it finds."""
    modulated = tiny.scales()
    assert all(layer.zero_point == 0 for layer in modulated.layers.values() if layer.mode == "modiff")
    plain = modulated.without_modulation()
    assert any(plain.layers[name].zero_point for name in modulated.modulated)
    dynamic = tiny.scales(method="qdiff", granularity="tensor")
    assert all(layer.activation_zero_point == 0 for layer in dynamic.layers.values())


def test_a_low_zero_point_brings_plain_int8_nearer_to_full_precision(demo):
    scales = demo.scales(method="qdiff", min_intensity=100.0)
    symmetric = {
        name: replace(
            layer,
            activation_zero_point=0,
            activation_scale=demo.ranges[name].activation.scale("mse", layer.act_bits, 1.0),
        )
        for name, layer in scales.layers.items()
    }
    reference = demo.sample(demo.float_denoiser())
    found = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales))
    before = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, replace(scales, layers=symmetric)))
    assert psnr(found, reference) > psnr(before, reference) + 1


def test_a_layer_whose_residual_is_not_smaller_is_not_modulated(tiny):
    before = tiny.scales().modulated
    name = before[3]
    ranges = tiny.ranges[name]
    kept = ranges.residual.absmax
    ranges.residual.absmax = ranges.activation.absmax * 1.01
    try:
        scales = tiny.scales()
    finally:
        ranges.residual.absmax = kept
    assert scales.layers[name].mode == "int8" and name not in scales.modulated
    assert scales.modulated == tuple(n for n in before if n != name)
    assert scales.rows.multipliers.shape[1] == len(before) - 1


def test_layers_that_only_move_data_stay_in_float(tiny):
    scales = tiny.scales(min_intensity=100.0)
    for spec in tiny.network.layers:
        assert (scales.layers[spec.name].mode == "float") == (spec.intensity < 100)
    assert 0 < len(scales.modulated) < len(tiny.network.layers)


@pytest.mark.parametrize(
    "recipe",
    [
        {"start": "soon"},
        {"min_intensity": -1.0},
        {"percentile": 2.0},
        {"method": "qdiff", "residuals": "quantized"},
        {"granularity": "tensor", "scale_method": "learned"},
        {"activation_method": "learned"},
        {"activation_method": "kl"},
    ],
)
def test_recipes_that_contradict_themselves_are_refused(recipe):
    with pytest.raises(InputError):
        Recipe(**recipe)


def test_warmup_rows_come_down_from_the_full_range_to_the_running_grid():
    full, bits = np.array([0.5, 8.0, 30.0]), np.array([4, 4, 4])
    rows = modulated_rows((800, 400, 0), full, bits, "warmup")
    np.testing.assert_allclose(rows.multipliers[:3], [[1, 8, 30], [1, 8 / 7, 30 / 7], [1, 1, 1]], rtol=1e-6)
    assert rows.warmup == 3 and rows.t.tolist() == [800] * 3 + [800, 400, 0] and rows.timesteps == (800, 400, 0)
    assert (rows.multipliers[3:] == 1).all()
    assert modulated_rows((800, 0), full, np.array([8, 8, 8]), "warmup").warmup == 2
    exact = modulated_rows((800, 0), full, bits, "exact")
    assert exact.exact_start and exact.warmup == 0 and exact.t.tolist() == [800, 0]


def test_row_table_follows_the_measured_ranges(tiny):
    scales = tiny.scales()
    for column, name in enumerate(scales.modulated):
        full = tiny.ranges[name].activation_max[0] / 127 / scales.layers[name].residual_scale
        assert abs(scales.rows.multipliers[0, column] - max(full, 1.0)) <= 0.5 / units_a_scale(scales, name)
    assert tiny.scales(method="qdiff").rows.multipliers.shape == (6, 0)
    assert not tiny.scales(start="exact").dither and tiny.scales().dither and not tiny.scales(dither=False).dither


@pytest.mark.parametrize("recipe", [{}, {"act_bits": 4}, {"split": True}, {"method": "qdiff"}])
def test_steps_are_those_that_an_integer_state_counts(tiny, recipe):
    """So that the simulation of a file rounds what a deployed engine rounds: the native table has the file's own steps."""
    scales = tiny.scales(**recipe)
    searched = replace(scales, rows=replace(scales.rows, multipliers=scales.rows.multipliers * np.float32(0.77)))
    for found in (
        scales,
        refit(scales, {n: 0.9 * scales.layers[n].scale for n in scales.modulated}),
        with_whole_steps(searched),
    ):
        model = build(tiny.network, tiny.checkpoint.params, found)
        for column, name in enumerate(found.modulated):
            at, layer = model.layers[name].grid_at, found.layers[name]
            steps = found.rows.multipliers[:, column].astype(np.float64) * layer.scale
            np.testing.assert_allclose(model.table[:, at + 3].double().numpy(), steps, rtol=1e-6)
    if scales.modulated:
        assert any((searched.rows.multipliers != with_whole_steps(searched).rows.multipliers).any(axis=0))


def test_a_grid_too_fine_to_count_is_left_as_it_is(tiny):
    scales = tiny.scales()
    name = scales.modulated[0]
    fine = replace(scales.layers[name], residual_scale=1e-9)
    rows = replace(scales.rows, multipliers=scales.rows.multipliers * np.float32(0.77))
    found = with_whole_steps(replace(scales, layers=scales.layers | {name: fine}, rows=rows))
    np.testing.assert_array_equal(found.rows.multipliers[:, 0], rows.multipliers[:, 0])
    with pytest.raises(InputError, match="int16 cannot count"):
        build(tiny.network, tiny.checkpoint.params, found)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(tiny, bad):
    x = tiny.trajectories.x.copy()
    x[-1, 0, 0, 0, 0] = bad
    with pytest.raises(InputError, match="not finite"):
        measure_ranges(tiny.network, tiny.checkpoint.params, replace(tiny.trajectories, x=x), 3)


def test_edge_bits(tiny):
    layers = tiny.scales(act_bits=4, weight_bits=4, edge_bits=8).layers
    assert (layers["conv_in"].act_bits, layers["conv_out"].weight_bits, layers["mid_block.attentions.0.to_qkv"].act_bits) == (
        8,
        8,
        4,
    )
    assert tiny.scales(act_bits=4).layers["conv_in"].act_bits == 4


@pytest.mark.parametrize(
    "bad", [{"method": "ptq"}, {"act_bits": 9}, {"weight_bits": 1}, {"scale_method": "kl"}, {"edge_bits": 0}]
)
def test_bad_recipes(bad):
    with pytest.raises(InputError):
        Recipe(**bad)


def test_residuals_activations_and_weights_have_an_option_each(tiny):
    plain, activations, weights, residuals = (
        tiny.scales(**recipe)
        for recipe in ({}, {"activation_method": "minmax"}, {"weight_scale_method": "mse"}, {"scale_method": "mse"})
    )
    for name, layer in plain.layers.items():
        assert residuals.layers[name].activation_scale == layer.activation_scale
        assert activations.layers[name].residual_scale == layer.residual_scale
        # MSE clips: its grid is never wider than the one that holds all.
        assert layer.activation_scale <= activations.layers[name].activation_scale
    assert any(activations.layers[n].activation_scale > layer.activation_scale for n, layer in plain.layers.items())
    assert any(residuals.layers[n].residual_scale != layer.residual_scale for n, layer in plain.layers.items())
    same = {
        name: np.array_equal(layer.weight_scale, activations.layers[name].weight_scale) for name, layer in plain.layers.items()
    }
    assert all(same.values())
    assert any(layer.activation_scale != activations.layers[name].activation_scale for name, layer in plain.layers.items())
    assert any(
        not np.array_equal(layer.weight_scale, weights.layers[name].weight_scale) for name, layer in plain.layers.items()
    )
    assert all(layer.activation_scale == weights.layers[name].activation_scale for name, layer in plain.layers.items())


def test_scales_file_round_trip_and_refusals(tiny, demo, tmp_path):
    file = tmp_path / "s.safetensors"
    scales = tiny.scales(scale_method="mse", edge_bits=8)
    save_scales(file, scales)
    loaded = load_scales(file, tiny.network, tiny.checkpoint.sha256)
    assert loaded.layer_table() == scales.layer_table()
    assert list(loaded.layers) == [spec.name for spec in tiny.network.layers]  # the columns of the row table
    assert loaded.modulated == scales.modulated
    np.testing.assert_array_equal(loaded.rows.multipliers, scales.rows.multipliers)
    np.testing.assert_array_equal(loaded.residual_range, scales.residual_range)
    for name, layer in loaded.layers.items():
        assert layer.scale == pytest.approx(scales.layers[name].scale, rel=1e-6)
    with pytest.raises(InputError, match="another checkpoint"):
        load_scales(file, tiny.network, "0" * 64)
    with pytest.raises(InputError, match="another configuration"):
        load_scales(file, demo.network)
    name = next(iter(scales.layers))
    for impossible in (3, -1, -128):
        layers = scales.layers | {name: replace(scales.layers[name], activation_zero_point=impossible)}
        save_scales(file, replace(scales, layers=layers))
        with pytest.raises(InputError, match="what no layer can be"):
            load_scales(file)
    layers = scales.layers | {name: replace(scales.layers[name], activation_zero_point=-96)}
    save_scales(file, replace(scales, layers=layers, granularity="tensor"))
    with pytest.raises(InputError, match="which no dynamic grid has"):
        load_scales(file)


def test_scales_files_before_zero_points_are_read(tiny, tmp_path):
    file = tmp_path / "s.safetensors"
    save_scales(file, tiny.scales(method="qdiff"))
    stored = load_arrays(file, "scales", SCHEMA)
    layers = {
        name: {k: entry[k] for k in ("mode", "act_bits", "weight_bits")} for name, entry in stored.header["layers"].items()
    }
    save_arrays(file, stored.header | {"schema": 7, "layers": layers}, stored.arrays)
    assert all(layer.zero_point == 0 for layer in load_scales(file, tiny.network).layers.values())
    save_arrays(file, stored.header | {"schema": 6, "layers": layers}, stored.arrays)
    with pytest.raises(InputError, match="has schema version 6"):
        load_scales(file)


def test_shipped_scales_belong_to_the_shipped_model(demo):
    for name in ("modiff-w8a8", "modiff-w8a6", "modiff-w8a8-2m15"):
        scales = load_scales(ROOT / f"calib_cache/demo/{name}.safetensors", demo.network, demo.checkpoint.sha256)
        assert len(scales.modulated) > 30


def test_trajectories_keep_the_step_before_each_chosen_one():
    chosen, stored = choose_steps(50, 20)
    assert chosen[0] == 0 and chosen[-1] == 49 and len(chosen) == 20
    assert all(i == 0 or i - 1 in stored for i in chosen)
    assert choose_steps(5, 20) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])


def test_trajectory_file_refusals(tiny, demo, tmp_path):
    file = tmp_path / "t.safetensors"
    save_trajectories(file, tiny.trajectories)
    loaded = load_trajectories(file, tiny.network.config, tiny.checkpoint.sha256)
    np.testing.assert_array_equal(loaded.x, tiny.trajectories.x)
    assert loaded.timesteps == tiny.timesteps
    with pytest.raises(InputError, match="another configuration"):
        load_trajectories(file, demo.network.config, tiny.checkpoint.sha256)
    with pytest.raises(InputError, match="another checkpoint"):
        load_trajectories(file, tiny.network.config, "0" * 64)


def test_network_of_a_trace_has_unique_layer_names(tiny):
    names = [spec.name for spec in trace(tiny.network.config).layers]
    assert len(names) == len(set(names))


def test_a_method_that_nobody_searches_for_is_no_other(tiny):
    """An unknown method once gave min-max scales under its own name; of dynamic grids a method is refused, not ignored."""
    with pytest.raises(ValueError, match="no search for"):
        tiny.ranges["conv_in"].activation.scale("halved", 8, 0.999)
    with pytest.raises(InputError, match="--scale-method mse is for --granularity static"):
        Recipe(granularity="tensor", scale_method="mse")
    with pytest.raises(InputError, match="--weight-scale-method must be one of minmax, mse, found 'learned'"):
        Recipe(weight_scale_method="learned")
