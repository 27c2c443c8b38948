"""The least time of a native pass, counted by hand for a network small enough."""

import pytest
from conftest import make_case, random_checkpoint, tiny_config

from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.native.floors import Work, floors, pass_floor, work

CEILINGS = {"copy_bytes_a_second": 2e12, "int8_operations_a_second": 1e15, "fp16_operations_a_second": 5e14}


@pytest.fixture(scope="module")
def small():
    config = tiny_config(size=8, ch_mult=(1, 2), attn=(4,))
    return make_case(trace(config), random_checkpoint(config), 3, 2, 3)


def test_bytes_and_operations_are_those_of_the_shapes(small):
    scales = with_modes(small.scales(), {"conv_in": "float", "down_blocks.0.resnets.0.conv1": "int8"})
    items = work(small.network, scales)
    stem, first = small.network.layer("conv_in"), small.network.layer("down_blocks.0.resnets.0.conv1")
    channels = stem.out_shape[0]
    assert items[0] == Work("float products", 2 * (3 + channels) * 64, fp16=2 * stem.macs)
    # Plain INT8: read float16 and write int8; then read int8 and write float16.
    assert Work("quantize", (2 + 1) * channels * 64) in items
    assert Work("INT8 convolution", (1 + 2) * channels * 64, int8=2 * first.macs) in items
    # With MoDiff: state int16 is read and written too, and o_hat of float16 is read and written.
    assert Work("quantize", (2 + 4 + 1) * channels * 64) in items
    second = small.network.layer("down_blocks.0.resnets.0.conv2")
    assert Work("INT8 convolution", (1 + 4) * channels * 64, int8=2 * second.macs) in items
    # Attention at 4x4 pixels, of each to each: products with k and with v, over all channels.
    attention = [item for item in items if item.kind == "attention"]
    assert [item.fp16 for item in attention] == [2 * 2 * 16 * 16 * 64] * 4
    products = [item for item in items if item.kind != "attention"]
    assert sum(item.int8 + item.fp16 for item in products) == 2 * sum(s.macs for s in small.network.layers)


def test_launches_that_overlap_need_the_longer_of_moving_and_multiplying():
    items = [Work("a", 2e6, int8=0.5e9), Work("b", 1e6, int8=2e9), Work("b", 0.0, fp16=1e9)]
    assert floors(items, CEILINGS) == pytest.approx({"a": 1.0, "b": 2.0 + 2.0})
    assert pass_floor(items, CEILINGS) == pytest.approx(2.5 + 2.0)
    assert pass_floor([Work("a", 2e7, int8=1e9)], CEILINGS) == pytest.approx(10.0)


def test_state_costs_traffic(small):
    scales = small.scales()
    plain = pass_floor(work(small.network, scales.without_modulation()), CEILINGS)
    assert pass_floor(work(small.network, scales), CEILINGS) > plain
