"""o_hat from a_hat: equal to the sums of all passes, whatever stood there before, and in time."""

import numpy as np
import pytest
import torch
from native_reference import ReferenceKernels
from small_network import small_case

from modiff_trt.core.state_grid import STATE_MAX
from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.runtime.backends.native import denoiser as native_denoiser
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
from modiff_trt.tools.bench.run import whole_intervals

MIXED = {"conv_in": "float", "up_blocks.1.resnets.0.conv2": "int8", "mid_block.resnets.0.conv1": "int8"}


class HalfKernels(ReferenceKernels):
    """float16 between layers, as on a GPU."""

    real = torch.float16


@pytest.fixture(scope="module")
def small():
    return small_case(3)


def native(case, scales, kernels):
    return NativeDenoiser(case.network, case.checkpoint.params, scales, kernels, "cpu")


def noise(case, images):
    return np.random.default_rng(0).standard_normal((images, *case.network.config.input_shape), np.float32)


def assert_near(found, expected, tolerance):
    for name, out in expected.items():
        bound = tolerance * float(out.abs().max())
        torch.testing.assert_close(found[name].float(), out, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("recipe", "modes", "factor"),
    [
        ({}, {}, 1),
        ({"act_bits": 4, "split": True}, MIXED, 1),
        ({}, {}, 100),
        ({"granularity": "tensor"}, {}, 100),
    ],
)
def test_it_is_the_sum_of_all_passes(small, recipe, modes, factor):
    """Among the layers are an upsampled one, one of three channels, and shortcuts that share an accumulator. A hundred times
    the noise is more than the first layer's state can count."""
    scales = with_modes(small.scales(**recipe), modes)
    denoiser = native(small, scales, ReferenceKernels())
    denoiser.trajectory(factor * noise(small, 2))
    buffers = denoiser._buffers
    assert factor == 1 or buffers.state["conv_in"].abs().max() > 0.8 * STATE_MAX
    assert denoiser._shared and any(layer.spec.upsampled for layer in denoiser._model.layers.values())
    sums = {name: out.clone() for name, out in buffers.o_hat.items()}
    states = {name: state.clone() for name, state in buffers.state.items()}
    for out in buffers.o_hat.values():
        out.uniform_(-100, 100)
    denoiser._refresh(2)
    assert_near(buffers.o_hat, sums, 1e-4)
    assert all(torch.equal(state, states[name]) for name, state in buffers.state.items())
    # What overflowed is found at the end of a trajectory, also when a refresh has come between.
    name = next(name for name in buffers.o_hat if name not in denoiser._shared)
    for bad in (float("inf"), float("nan")):
        buffers.o_hat[name][1, 2, 3] = bad
        denoiser._refresh(2)
        assert buffers.o_hat[name].isfinite().sum() == buffers.o_hat[name].numel() - 1
        buffers.o_hat[name][1, 2, 3] = 0
    # Of float16 sums what is left is about one rounding.
    half = native(small, scales, HalfKernels())
    half.reset(2)
    for name, state in states.items():
        half._buffers.state[name].copy_(state)
    half._refresh(2)
    assert_near(half._buffers.o_hat, sums, 2**-10)


def test_float16_sums_are_refreshed_every_so_many_passes_but_the_last(small, monkeypatch):
    monkeypatch.setattr(native_denoiser, "REFRESH", 2)
    due = []

    class Counted(NativeDenoiser):
        """Which passes a refresh follows; nothing is computed."""

        def _pass(self, size):
            self._counter.add_(1)

        def _refresh(self, size):
            due.append(int(self._counter))

    def counted(scales, kernels):
        return Counted(small.network, small.checkpoint.params, scales, kernels, "cpu")

    denoiser, x = counted(small.scales(), HalfKernels()), noise(small, 1)
    denoiser.trajectory(x)
    assert {out.dtype for name, out in denoiser._buffers.o_hat.items() if name != "conv_out"} == {torch.float16}
    assert len(denoiser.rows) == 5 and due == [2, 4]
    due.clear()
    denoiser.begin(x)  # a trajectory that goes no further than this
    for _ in range(3):
        denoiser.step()
    denoiser.trajectory(x)
    assert due == [2, 2, 4]
    due.clear()
    denoiser.reset(1)
    for row in range(5):  # as the sampler does
        denoiser(torch.from_numpy(x), row)
    assert due == [2, 4]
    due.clear()
    for row in (0, 0, 1):
        denoiser(torch.from_numpy(x), row)
    assert due == [2]
    due.clear()
    assert [whole_intervals(passes, [denoiser]) for passes in (1, 2, 9)] == [2, 2, 10]
    monkeypatch.setattr(native_denoiser, "REFRESH", 1)
    denoiser.trajectory(x)
    assert due == [1, 2, 3, 4]
    assert counted(small.scales(), ReferenceKernels()).refresh_every == 0
    assert counted(small.scales(method="qdiff"), HalfKernels()).refresh_every == 0
    monkeypatch.setattr(native_denoiser, "REFRESH", 5)
    assert counted(small.scales(), HalfKernels()).refresh_every == 0
