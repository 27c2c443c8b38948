"""The native backend's network against the simulation of the same scales."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import with_low_zero_points
from native_reference import ReferenceKernels
from native_snapped import Snapped
from small_network import small_case

from modiff_trt.core.errors import InputError
from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.networks.modulated import moving_shifts
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr


@pytest.fixture(scope="module")
def small():
    return small_case()


def native(case, scales):
    return NativeDenoiser(case.network, case.checkpoint.params, scales, ReferenceKernels(), "cpu")


def assert_images_of_the_simulation(case, scales):
    """Of three images one may have had a value on an edge of its grid, which another order of sums rounds the other way."""
    found, expected = (case.sample(denoiser, 3, seed=2) for denoiser in (native(case, scales), Snapped(case, scales)))
    nearness = sorted(psnr(found[i : i + 1], expected[i : i + 1]) for i in range(3))
    assert nearness[0] > 25
    assert nearness[1] > 80


@pytest.mark.parametrize(
    "recipe",
    [{"act_bits": 8}, {"act_bits": 4, "split": True}, {"method": "qdiff"}, {"method": "qdiff", "act_bits": 6, "edge_bits": 8}],
)
def test_images_are_those_of_the_simulation(small, recipe):
    assert_images_of_the_simulation(small, small.scales(**recipe))


def test_zero_points_in_all_layers(small):
    """Those without padding have no frame, and their integers a zero point all the same."""
    scales = small.scales(method="qdiff")
    assert_images_of_the_simulation(small, with_low_zero_points(scales, scales.layers))


@pytest.mark.parametrize("recipe", [{"act_bits": 6}, {"method": "qdiff"}])
def test_grids_that_follow_each_image_are_those_of_the_simulation(small, recipe):
    """LTQ: the native step is the next whole number of units, a little above the simulation's."""
    scales = small.scales(granularity="tensor", **recipe)
    denoiser = native(small, scales)
    assert all(layer.dynamic for layer in denoiser._model.layers.values())
    together = small.sample(denoiser, 2)
    simulated = small.sample(SimDenoiser(small.network, small.checkpoint.params, scales), 2)
    assert psnr(together, simulated) > 25
    static = small.sample(SimDenoiser(small.network, small.checkpoint.params, small.scales(**recipe)), 2)
    assert psnr(together, simulated) > psnr(static, simulated)
    assert psnr(small.sample(denoiser, 1), together[:1]) > 60  # an image's grid is its own


@pytest.mark.parametrize("whole", [True, False])
def test_sums_that_leave_their_range_are_refused(small, whole, monkeypatch):
    """A sum in the middle: the next layer's integers hide it."""
    denoiser = native(small, small.scales())
    begin, name = denoiser._begin, "mid_block.resnets.0.conv1"

    def overflowed(size):
        begin(size)
        denoiser._buffers.o_hat[name][0, 0, 0] = float("inf")

    monkeypatch.setattr(denoiser, "_begin", overflowed)
    x = np.zeros((1, *small.network.config.input_shape), np.float32)
    with pytest.raises(InputError, match="a sum o_hat left the range"):
        if whole:
            denoiser.trajectory(x)
        else:
            denoiser.reset(1)
            for row in range(len(denoiser.rows)):
                denoiser(denoiser.from_host(x), row)


def test_layers_in_float_and_stateless_pairs(small):
    scales = with_modes(
        small.scales(), {"conv_in": "float", "up_blocks.1.resnets.0.conv2": "int8", "mid_block.resnets.0.conv1": "int8"}
    )
    assert_images_of_the_simulation(small, scales)


@pytest.mark.parametrize("bits", [8, 5])
def test_moving_grids(small, bits):
    """Of a network without state, with shortcuts that share an accumulator, and beside layers with state."""
    plain = replace(small.scales(method="qdiff", act_bits=bits), moving_grids=True)
    assert_images_of_the_simulation(small, plain)
    x = torch.randn(2, *small.network.config.input_shape, generator=torch.Generator().manual_seed(5))
    still = Snapped(small, replace(plain, moving_grids=False))
    for row in range(len(plain.rows)):
        answers = []
        for denoiser in (native(small, plain), Snapped(small, plain), still):
            denoiser.reset(len(x))
            answers.append(denoiser(x, row))
        torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
        assert (answers[1] - answers[2]).abs().max() > 1e-3  # and they move
    assert not np.array_equal(*moving_shifts(small.network, plain).numpy())
    some = with_modes(small.scales(act_bits=bits), {"up_blocks.1.resnets.0.conv2": "int8", "mid_block.resnets.0.conv1": "int8"})
    assert some.moving_grids
    assert_images_of_the_simulation(small, some)


def test_a_whole_trajectory_is_the_sampler_s(small):
    denoiser = native(small, small.scales())
    x = np.random.default_rng(0).standard_normal((1, *small.network.config.input_shape), np.float32)
    from modiff_trt.runtime.sampler import sample_trajectory

    stepwise = sample_trajectory(denoiser, small.updates(), x, on_pass=lambda *_: None)
    np.testing.assert_allclose(denoiser.trajectory(x), stepwise, rtol=1e-4, atol=1e-4)


def test_padding_of_a_batch_starts_anew_with_every_trajectory(small, monkeypatch):
    """On a GPU a batch is padded to a power of two; images that nobody asked for must not grow for ever."""
    denoiser = native(small, small.scales())
    monkeypatch.setattr(denoiser, "_padded", lambda batch: 2)
    small.sample(denoiser, 1)
    first = denoiser._x[1].clone()
    small.sample(denoiser, 1)
    assert torch.equal(denoiser._x[1], first)


def test_batch_size_does_not_change_an_image(small):
    denoiser = native(small, small.scales())
    together = small.sample(denoiser, images=2)
    alone = small.sample(denoiser, images=1)
    assert psnr(together[:1], alone) > 60


def test_state_is_exact_multiples_and_shared_accumulators_are_counted_once(tiny):
    denoiser = native(tiny, tiny.scales())
    names = [info.name for info in denoiser.state_info]
    assert len(names) == len(set(names))
    assert not any(name.startswith("o_hat.") and name.endswith("conv_shortcut") for name in names)
    denoiser.reset(2)
    assert all(t.dtype == torch.int16 for t in denoiser._buffers.state.values())


def test_what_only_the_simulation_can_run_is_refused(small):
    for recipe in ({"start": "exact"}, {"granularity": "channel"}):
        with pytest.raises(InputError):
            native(small, small.scales(**recipe))
