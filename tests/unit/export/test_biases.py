"""Bias correction, against the mean error that convolutions make on recorded inputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import load_arrays, save_arrays
from modiff_trt.core.scales import SCHEMA, load_scales, save_scales
from modiff_trt.export.calibration.biases import correct_biases
from modiff_trt.export.calibration.ranges import measure_ranges
from modiff_trt.export.calibration.trials import Trials
from modiff_trt.networks.binding import time_table
from modiff_trt.networks.modulated import quantize_layers
from modiff_trt.networks.torch_ops import float_layer, layer_bias, layer_weight, run_unet
from modiff_trt.runtime.backends.registry import trained


def mean_errors(case, scales):
    """By layer: float64 [chosen steps, C_out], the mean over images and pixels of what rounding adds to each output."""
    table, plain = time_table(case.network, case.checkpoint.params), float_layer(case.checkpoint.params)
    quantized = quantize_layers(case.network, case.checkpoint.params, scales)
    position = {int(step): i for i, step in enumerate(case.trajectories.steps)}
    found = {spec.name: [] for spec in case.network.layers}

    def record(spec, x):
        layer, ratio = quantized[spec.name], scales.layers[spec.name].skip_ratio
        weight = layer.weight.double() * layer.weight_scale.double()[:, None, None, None]
        weight[:, spec.split :] *= 1 / ratio
        off = weight - layer_weight(spec, case.checkpoint.params).double()
        top, left, bottom, right = spec.padding
        error = F.conv2d(F.pad(x.double(), (left, right, top, bottom)), off, stride=spec.stride)
        found[spec.name].append(error.mean((0, 2, 3)))
        return plain(spec, x)

    with torch.no_grad():
        for step in case.trajectories.chosen:
            x = torch.from_numpy(case.trajectories.x[position[int(step)]])
            bias = {b: rows[case.timesteps[int(step)]].expand(len(x), -1) for b, rows in table.items()}
            run_unet(case.network, case.checkpoint.params, x, bound=bias, layer=record)
    return {name: torch.stack(errors) for name, errors in found.items()}


@pytest.mark.parametrize("recipe", [{"weight_bits": 4}, {"weight_bits": 5, "split": True}])
def test_the_shift_is_the_mean_error_as_the_final_image_sees_it(tiny, recipe):
    scales = tiny.scales(**recipe)
    # In parts of other sizes than the whole: every image counts once.
    ranges = measure_ranges(tiny.network, tiny.checkpoint.params, tiny.trajectories, batch_size=2)
    corrected = correct_biases(tiny.network, tiny.checkpoint.params, scales, ranges)
    share = np.abs(tiny.updates().sensitivity[scales.range_steps])
    for name, errors in mean_errors(tiny, scales).items():
        expected = -(torch.from_numpy(share / share.sum())[:, None] * errors).sum(0)
        np.testing.assert_allclose(corrected.layers[name].bias_shift, expected, rtol=1e-3, atol=1e-6)
        assert float(expected.abs().max()) > 1e-4


def test_layers_in_float_keep_their_bias(tiny):
    scales = tiny.scales(min_intensity=60.0)
    corrected = correct_biases(tiny.network, tiny.checkpoint.params, scales, tiny.ranges)
    shifts = [(layer.mode == "float", layer.bias_shift is None) for layer in corrected.layers.values()]
    assert all(a == b for a, b in shifts) and {a for a, _ in shifts} == {True, False}


def test_rounded_weights_lose_less_with_it(demo):
    trials = Trials(demo.network, demo.checkpoint, demo.timesteps, demo.trajectories.solver, images=2, seed=2, device="cpu")
    scales = demo.scales(min_intensity=200.0)
    corrected = correct_biases(demo.network, demo.checkpoint.params, scales, demo.ranges)
    assert trials.weights_alone(corrected) > trials.weights_alone(scales) + 3


def test_every_interpreter_has_the_shift(tiny, tmp_path):
    """A shift so large that an interpreter without it would be seen."""
    from modiff_trt.export.onnx.network import build_onnx, save_onnx
    from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
    from modiff_trt.runtime.backends.registry import exported

    plain = tiny.scales()
    layers = {n: replace(v, bias_shift=np.full(len(v.weight_scale), 0.5, np.float32)) for n, v in plain.layers.items()}
    scales = replace(plain, layers=layers)
    first = next(iter(scales.layers))
    quantized = quantize_layers(tiny.network, tiny.checkpoint.params, scales)[first]
    assert torch.allclose(quantized.bias, layer_bias(tiny.network.layer(first), tiny.checkpoint.params) + 0.5)
    params, steps = tiny.checkpoint.params, tiny.timesteps
    file = tmp_path / "m.onnx"
    save_onnx(file, build_onnx(tiny.network, tiny.checkpoint, scales, dtype="fp32", scales_sha256=None))
    without = trained.simulated(tiny.network, params, plain)
    others = {
        "onnx": exported.onnxruntime(load_onnx(file, "cpu"), steps, "cpu"),
        "native": trained.native(tiny.network, params, scales),
    }
    x = torch.randn(2, *tiny.network.config.input_shape, generator=torch.Generator().manual_seed(0))

    def answer(denoiser):
        denoiser.reset(2)
        return denoiser.to_host(denoiser(denoiser.from_host(x.numpy()), 0))

    exact = answer(trained.simulated(tiny.network, params, scales))
    far = np.abs(answer(without) - exact).mean()
    # A value on the edge of a grid rounds the other way here and there; that is small beside a missing shift.
    for name, denoiser in others.items():
        assert np.abs(answer(denoiser) - exact).mean() < 0.1 * far, name


def test_a_shift_is_read_back_and_a_damaged_one_refused(tiny, tmp_path):
    corrected = correct_biases(tiny.network, tiny.checkpoint.params, tiny.scales(), tiny.ranges)
    path = tmp_path / "s.safetensors"
    save_scales(path, corrected)
    again = load_scales(path, tiny.network)
    for name, layer in corrected.layers.items():
        np.testing.assert_array_equal(again.layers[name].bias_shift, layer.bias_shift)
    header, arrays, _ = load_arrays(path, "scales", SCHEMA)
    for value in (np.full_like(arrays["layer.conv_in.bias_shift"], np.nan), np.zeros(3, np.float32), np.zeros(32, np.int64)):
        save_arrays(path, header, arrays | {"layer.conv_in.bias_shift": value})
        with pytest.raises(InputError, match="bias_shift"):
            load_scales(path)
