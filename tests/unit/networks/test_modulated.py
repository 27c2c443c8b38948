from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import integer_conv

from modiff_trt.core import moving_grids
from modiff_trt.core.grid import low_zero_point
from modiff_trt.networks.affine import NativeINT8Quantizer
from modiff_trt.networks.modulated import LayerState, QuantizedLayer, initial_state, modulated_layer, stateless_layer
from modiff_trt.networks.operations import LayerSpec

SHAPES = [
    (1, 3, 5, 7, 9, 3, 1, (1, 1, 1, 1)),
    (3, 5, 8, 6, 10, 3, 2, (0, 0, 1, 1)),
    (2, 33, 17, 1, 3, 1, 1, (0, 0, 0, 0)),
]
IDS = ["3x3-5to7", "strided-odd-channels", "1x1-33to17"]


def make_layer(shape, bits, dtype=torch.float64, mode="modiff"):
    n, cin, cout, height, width, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(bits)
    out = (
        cout,
        (height + padding[0] + padding[2] - kernel) // stride + 1,
        (width + padding[1] + padding[3] - kernel) // stride + 1,
    )
    spec = LayerSpec("layer", ("layer",), (cin, height, width), out, kernel, stride, padding)
    weight = torch.randint(-127, 128, (cout, cin, kernel, kernel), generator=generator).to(dtype)
    weight_scale = torch.rand(cout, generator=generator, dtype=dtype) * 0.01 + 1e-3
    bias = torch.randn(cout, generator=generator, dtype=dtype)
    layer = QuantizedLayer(spec, mode, bits, 0.03, weight, weight_scale, bias)
    return layer, torch.randn(n, cin, height, width, generator=generator, dtype=dtype)


def reference_pass(layer, x, a_hat, o_hat, m):
    """The layer contract by its definition, in float64 and exact integers."""
    low, high = -(2 ** (layer.bits - 1)), 2 ** (layer.bits - 1) - 1
    q = np.clip(np.rint((x - a_hat) / m / layer.scale), low, high).astype(np.int64)
    product = integer_conv(q, layer.weight.numpy().astype(np.int64), layer.spec.stride, layer.spec.padding)
    a_hat = a_hat + m * layer.scale * q
    o_hat = o_hat + m * layer.scale * layer.weight_scale.numpy()[None, :, None, None] * product
    return q, a_hat, o_hat


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_three_passes_equal_the_definition(shape, bits):
    layer, x = make_layer(shape, bits)
    state = initial_state(layer, len(x))
    a_hat = np.zeros(x.shape)
    o_hat = np.broadcast_to(layer.bias.numpy()[None, :, None, None], (len(x), *layer.spec.out_shape)).copy()
    for multiplier, drift in ((7.5, 0.0), (1.0, 0.01), (0.5, -0.02)):
        value = x + drift
        y, state = modulated_layer(layer, value, state, multiplier)
        q, a_hat, o_hat = reference_pass(layer, value.numpy(), a_hat, o_hat, multiplier)
        assert q.min() >= -(2 ** (bits - 1)) and q.max() <= 2 ** (bits - 1) - 1
        np.testing.assert_allclose(state.a_hat.numpy(), a_hat, rtol=0, atol=1e-12)
        np.testing.assert_allclose(y.numpy(), o_hat, rtol=1e-12, atol=1e-10)
        assert y is state.o_hat


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_o_hat_is_always_the_layer_of_a_hat(shape):
    """Nothing accumulates: after any number of passes o_hat = W a_hat + bias (eq. 14)."""
    layer, x = make_layer(shape, 4)
    state = initial_state(layer, len(x))
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        x = x + 0.05 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        y, state = modulated_layer(layer, x, state, 5.0 if step == 0 else 1.0)
    scaled = np.rint(state.a_hat.numpy() / layer.scale).astype(np.int64)
    np.testing.assert_allclose(scaled * layer.scale, state.a_hat.numpy(), atol=1e-9)  # a_hat stays on the grid
    exact = layer.scale * integer_conv(scaled, layer.weight.numpy().astype(np.int64), layer.spec.stride, layer.spec.padding)
    expected = exact * layer.weight_scale.numpy()[None, :, None, None] + layer.bias.numpy()[None, :, None, None]
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_exact_start_follows_the_input_completely():
    layer, x = make_layer(SHAPES[0], 4)
    y, state = modulated_layer(layer, x, initial_state(layer, len(x)), 1.0, exact=True)
    torch.testing.assert_close(state.a_hat, x)
    weight = layer.weight * layer.weight_scale[:, None, None, None]
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, layer.bias, padding=1))


def test_stateless_layer_is_a_first_pass_on_the_activation_grid():
    layer, x = make_layer(SHAPES[0], 6)
    y, _ = modulated_layer(layer, x, initial_state(layer, len(x)), 1.0)
    torch.testing.assert_close(stateless_layer(layer, x), y)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_stateless_layer_with_a_low_zero_point_is_the_affine_quantizer(shape, bits):
    """Integers padded with the zero point, which stands for the real 0 outside of an image."""
    layer, x = make_layer(shape, bits, mode="int8")
    zero_point = low_zero_point(bits)
    layer, x = replace(layer, zero_point=zero_point), 3 * x.abs() - 0.1
    grid = NativeINT8Quantizer(torch.tensor(layer.scale), torch.tensor(zero_point), bits)
    q = grid.quantize(x).values.numpy().astype(np.int64)
    assert q.min() < zero_point and q.max() == 2 ** (bits - 1) - 1
    top, left, bottom, right = layer.spec.padding
    framed = np.pad(q, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero_point)
    product = integer_conv(framed - zero_point, layer.weight.numpy().astype(np.int64), layer.spec.stride, (0, 0, 0, 0))
    scale = layer.scale * layer.weight_scale.numpy()[:, None, None]
    expected = layer.bias.numpy()[:, None, None] + scale * product
    np.testing.assert_allclose(stateless_layer(layer, x).numpy(), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("bits", "zero_point"), [(8, 0), (8, -96), (4, -6)])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_moving_grid_is_shifted_and_shifted_back(shape, bits, zero_point):
    """Subtractive dither by its definition; padding is quantized like a pixel of value 0, to the integer 0."""
    layer, x = make_layer(shape, bits, mode="int8")
    layer, x = replace(layer, zero_point=zero_point, moving=True), 0.5 * x
    shifts = torch.rand(x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    by_channel = shifts.numpy()[:, None, None]
    low, high = -(2 ** (bits - 1)) - zero_point, 2 ** (bits - 1) - 1 - zero_point
    q = np.clip(np.rint(x.numpy() / layer.scale + by_channel), low, high)
    top, left, bottom, right = layer.spec.padding
    seen = np.pad(q, ((0, 0), (0, 0), (top, bottom), (left, right))) - by_channel
    weight = layer.weight.numpy() * layer.weight_scale.numpy()[:, None, None, None]
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(layer.scale * seen), torch.from_numpy(weight), layer.bias, stride=layer.spec.stride
    )
    torch.testing.assert_close(stateless_layer(layer, x, shifts), expected, rtol=1e-12, atol=1e-10)


def test_errors_of_a_moving_grid_cancel_over_steps_and_those_of_a_grid_that_stands_still_do_not():
    layer, x = make_layer(SHAPES[0], 8, mode="int8")
    exact = stateless_layer(replace(layer, scale=layer.scale / 1024, bits=24), x)
    still = stateless_layer(layer, x) - exact
    moving = replace(layer, moving=True)
    steps = torch.from_numpy(moving_grids.shifts(np.arange(32)[::-1], x.shape[1])).double()
    outputs = torch.stack([stateless_layer(moving, x, shifts) for shifts in steps])
    assert (outputs.mean(0) - exact).std() < 0.1 * still.std()
    assert (outputs[0] - exact).std() < 2 * still.std()  # and none is worse by itself


def test_a_moving_grid_without_shifts_is_refused():
    layer, x = make_layer(SHAPES[0], 8, mode="int8")
    with pytest.raises(ValueError, match="moving grid"):
        stateless_layer(replace(layer, moving=True), x)


def test_state_is_not_modified_in_place():
    layer, x = make_layer(SHAPES[0], 8)
    state = initial_state(layer, len(x))
    before = LayerState(state.a_hat.clone(), state.o_hat.clone())
    modulated_layer(layer, x, state, 1.0)
    assert torch.equal(state.a_hat, before.a_hat) and torch.equal(state.o_hat, before.o_hat)
