"""What sums are computed anew from, in Triton's interpreter."""

import pytest
import torch

from modiff_trt.core.state_grid import STATE_MAX
from modiff_trt.plugins.modulated_conv import reference
from modiff_trt.plugins.modulated_conv.kernels.refresh import set_to_bias, write_byte
from modiff_trt.plugins.modulated_conv.reference import InputShape


@pytest.mark.parametrize(
    "shape", [InputShape(48, 0, 5, 7), InputShape(3, 0, 9, 5), InputShape(96, 0, 33, 11), InputShape(16, 0, 3, 5, True)]
)
def test_low_and_high_make_the_count(shape):
    state = torch.randint(-STATE_MAX, STATE_MAX + 1, (3, shape.pixels, shape.total), dtype=torch.int16)
    state[0, 0, 0], state[1, 1, 1] = STATE_MAX, -STATE_MAX
    channels = -(-shape.total // 16) * 16
    low, high = torch.full((2, 3, shape.out_pixels, channels), 77, dtype=torch.int8)
    write_byte(shape, state, low, high=False)
    write_byte(shape, state, high, high=True)
    count = low.long() + 256 * high.long()
    expected = reference.upsample(shape, state.double()) if shape.upsample else state
    assert torch.equal(count[:, :, : shape.total], expected.long())
    assert (low[:, :, shape.total :] == 77).all() and (high[:, :, shape.total :] == 77).all()


@pytest.mark.parametrize("channels", [16, 48, 128, 384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_leaves_what_is_not_finite(channels, dtype):
    out, bias = torch.randn(3, 35, channels).to(dtype), torch.randn(channels)
    out[0, 0, 0], out[1, 34, 5], out[2, 17, -1] = float("inf"), float("-inf"), float("nan")
    expected = torch.where(out.isfinite(), bias.to(dtype), out)
    set_to_bias(out, bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert out.isfinite().sum() == out.numel() - 3
