"""The Triton kernel, in its interpreter here and on the GPU in tests/gpu, against the reference in float64."""

import pytest
import torch
from kernel_cases import CASES, PIXEL_CASES, check, check_pixels

from modiff_trt.plugins.modulated_conv.kernels.quantize import quantize_input
from modiff_trt.plugins.modulated_conv.reference import InputShape


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference(name):
    check(CASES[name], "cpu")


@pytest.mark.parametrize("outlier", [1.0, 150.0, 5000.0])
def test_what_a_state_cannot_count_does_not_coarsen_its_image_s_grid(outlier):
    """The largest value that a state can count here is 98. The others follow x as they would without it."""
    x, unit = torch.randn(2, 20, 16), 0.003
    x[0, 0, 0] = outlier
    state, q, steps = torch.zeros(x.shape, dtype=torch.int16), torch.zeros(x.shape, dtype=torch.int8), torch.zeros(2)
    for _ in range(8):
        quantize_input(InputShape(16, 0, 4, 5), x, q, grid=torch.tensor([1.0, unit, 1.0]), state=state, steps=steps)
    error = (unit * state.float() - x).abs()
    error[0, 0, 0] = 0
    assert error.max() < unit


@pytest.mark.parametrize("name", PIXEL_CASES)
def test_inputs_of_transformer_layers_equal_float64(name):
    check_pixels(PIXEL_CASES[name], "cpu")
