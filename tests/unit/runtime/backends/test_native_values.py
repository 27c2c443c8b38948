"""Lazy values: whatever follows whatever, the native network computes what the same operations on tensors give."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from native_reference import ReferenceKernels
from native_snapped import Snapped
from random_network import SIZE, A, RandomFunction, in_float, random_case, random_modes

from modiff_trt.networks.operations import Role, convolution, traced
from modiff_trt.networks.unet2d import resnet
from modiff_trt.runtime.backends.native.cpu_kernels import CpuKernels
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
from modiff_trt.runtime.backends.torch_denoiser import TorchDenoiser

# Triton's interpreter takes seconds for each.
NETWORKS = [(seed, CpuKernels) for seed in range(16)] + [(seed, ReferenceKernels) for seed in (3, 11)]
random_networks = pytest.mark.parametrize(("seed", "kernels"), NETWORKS)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.norm())


def noise(seed=0):
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_the_networks_use_every_operation():
    used = set()
    for seed in range(16):
        function = RandomFunction(seed)
        traced(tiny_config(SIZE, (1,), ()), function)
        used |= set(function.kinds)
    assert used == {name for name in vars(RandomFunction) if name.startswith("_do")}


@random_networks
def test_in_float_it_is_the_network_on_tensors(seed, kernels):
    case, x = random_case(seed), noise()
    native = NativeDenoiser(case.network, case.checkpoint.params, in_float(case), kernels(), "cpu")
    exact = TorchDenoiser(case.network, case.checkpoint.params, case.timesteps, dtype=torch.float64)
    native.reset(2)
    expected = exact(x.double(), 1)
    # As far as float32 holds the network at all.
    bound = 1e-5 + 20 * relative(case.float_denoiser()(x, 1), expected)
    assert relative(native(x, 1), expected) < bound < 1e-2


@random_networks
def test_with_mixed_modes_it_is_the_simulation(seed, kernels):
    """In some trajectories a value stands on an edge of its grid, where another order of sums rounds it the other way, which
    random weights enlarge. In most there is none, and then both are equal to float32's rounding."""
    case = random_case(seed)
    scales = random_modes(case, seed)
    native, simulated = NativeDenoiser(case.network, case.checkpoint.params, scales, kernels(), "cpu"), Snapped(case, scales)
    errors = []
    for trajectory in range(4):
        x = noise(trajectory)
        native.reset(2)
        simulated.reset(2)
        rows = [(native(x * (1 - 0.05 * row), row), simulated(x * (1 - 0.05 * row), row)) for row in range(2)]
        errors.append(max(relative(found, expected) for found, expected in rows))
        if errors[-1] < 1e-4:
            return
    raise AssertionError(errors)


def test_a_part_of_a_shared_sum_cannot_be_used():
    """The network says that the shortcut is added to conv2, and reads conv2 before."""

    def function(ops, x):
        first = convolution("conv_in", (3, SIZE, SIZE), 32, 3, role=Role.INPUT)
        h = ops.layer(first, x)
        conv2 = convolution("conv2", first.out_shape, 64, 3)
        y = ops.layer(conv2, h)
        spoilt = ops.norm_silu("norm", y, 32, 1e-6)
        shortcut = convolution("shortcut", first.out_shape, 64, 1, role=Role.SHORTCUT, added_to="conv2", beside="conv2")
        y = ops.add(ops.layer(shortcut, h), ops.add(y, spoilt))
        return ops.layer(convolution("conv_out", (64, SIZE, SIZE), 3, 3, role=Role.OUTPUT), y)

    case = random_case(0, function)
    native = NativeDenoiser(case.network, case.checkpoint.params, case.scales(), CpuKernels(), "cpu")
    native.reset(1)
    with pytest.raises(ValueError, match="'conv2' is used before its shortcut"):
        native(torch.zeros(1, 3, SIZE, SIZE), 0)


def test_one_state_for_four_pixels_needs_an_input_that_repeats():
    def function(ops, x):
        first = convolution("conv_in", (3, SIZE, SIZE), 32, 3, role=Role.INPUT, upsampled=True)
        return ops.layer(convolution("conv_out", (32, SIZE, SIZE), 3, 3, role=Role.OUTPUT), ops.layer(first, x))

    case = random_case(0, function)
    native = NativeDenoiser(case.network, case.checkpoint.params, in_float(case), CpuKernels(), "cpu")
    native.reset(1)
    with pytest.raises(ValueError, match="not what `upsample` gave"):
        native(torch.zeros(1, 3, SIZE, SIZE), 0)


def test_a_block_s_shortcut_is_found_by_its_role_and_not_by_its_name():
    def function(ops, x):
        first = convolution("conv_in", (3, SIZE, SIZE), 32, 3, role=Role.INPUT)
        h = resnet(ops, A, "any.name", ops.layer(first, x), first.out_shape, 64)
        return ops.layer(convolution("conv_out", (64, SIZE, SIZE), 3, 3, role=Role.OUTPUT), h)

    network = random_case(0, function).network
    (shortcut,) = (spec for spec in network.layers if spec.role is Role.SHORTCUT)
    assert (shortcut.beside, shortcut.added_to) == ("any.name.conv1", "any.name.conv2")
    assert np.all([network.layer(name).block == "any.name" for name in (shortcut.beside, shortcut.added_to)])


@pytest.mark.parametrize("kernels", [CpuKernels, ReferenceKernels])
def test_channels_that_no_tensor_core_takes(kernels):
    """A 1x1 layer in float whose 20 input channels are padded on a GPU, read as they are and after a concatenation."""

    def function(ops, x):
        h = ops.layer(convolution("conv_in", (3, SIZE, SIZE), 20, 3, role=Role.INPUT), x)
        h = ops.layer(convolution("one", (20, SIZE, SIZE), 20, 1), h)
        h = ops.layer(convolution("two", (40, SIZE, SIZE), 20, 1), ops.concat(h, h))
        return ops.layer(convolution("conv_out", (20, SIZE, SIZE), 3, 3, role=Role.OUTPUT), h)

    case, x = random_case(0, function), noise()
    native = NativeDenoiser(case.network, case.checkpoint.params, in_float(case), kernels(), "cpu")
    exact = TorchDenoiser(case.network, case.checkpoint.params, case.timesteps, dtype=torch.float64)
    native.reset(2)
    assert relative(native(x, 1), exact(x.double(), 1)) < 1e-5
