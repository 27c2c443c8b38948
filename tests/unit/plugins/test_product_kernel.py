"""Products of many pixels through tensor descriptors, in Triton's interpreter, against float64 and against `conv_kernel`."""

import pytest
import torch

from modiff_trt.plugins.modulated_conv.kernels.conv import convolve_real
from modiff_trt.plugins.modulated_conv.kernels.product import fits_descriptors, multiply_real


@pytest.mark.parametrize(("n", "pixels", "channels", "out"), [(3, 70, (64,), 128), (2, 130, (128, 64), 256)])
def test_it_equals_the_reference(n, pixels, channels, out):
    sources = [torch.randn(n, pixels, c) for c in channels]
    weight, bias = torch.randn(out, sum(channels)), torch.randn(out)
    found = torch.full((n, pixels, out), float("nan"))
    multiply_real(sources, weight, bias, found)
    expected = torch.cat(sources, 2).double() @ weight.double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    other = torch.full_like(found, float("nan"))
    window = {"size": (1, pixels), "stride": 1, "padding": (0, 0, 0, 0)}
    convolve_real(sources, weight.view(out, 1, 1, -1), bias, other, **window)
    torch.testing.assert_close(found, other, rtol=0, atol=5e-5)  # float32 sums, whose order is the CPU library's


def test_what_fits():
    assert fits_descriptors([torch.empty(128, 256, 64, dtype=torch.float16, device="meta")], 128)
    assert not fits_descriptors([torch.empty(128, 256, 64, device="meta")], 128)
    assert not fits_descriptors([torch.empty(1, 256, 64, dtype=torch.float16, device="meta")], 128)
    assert not fits_descriptors([torch.empty(128, 256, 48, dtype=torch.float16, device="meta")], 128)
    assert not fits_descriptors([torch.empty(128, 256, 64, dtype=torch.float16, device="meta")], 96)
