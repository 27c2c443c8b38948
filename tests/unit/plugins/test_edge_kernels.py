"""Convolutions in float with few input or few output channels, in Triton's interpreter, against float64."""

import pytest
import torch

from modiff_trt.core.kinds import Mode
from modiff_trt.networks.operations import Role, convolution
from modiff_trt.plugins.modulated_conv import reference
from modiff_trt.plugins.modulated_conv.geometry import Geometry, has_few_inputs, has_few_outputs
from modiff_trt.plugins.modulated_conv.kernels import conv, edges
from modiff_trt.runtime.backends.native.cuda_kernels import CudaKernels
from modiff_trt.runtime.backends.native.layers import NativeLayer

SAME, UNEVEN, NONE = (1, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 0)


def expected(x, weight, bias, size, stride, padding):
    ones = torch.ones(len(weight), dtype=torch.float64)
    return reference.accumulate(x.double(), weight.permute(0, 3, 1, 2).double(), ones, bias.double(), size, stride, padding)


def check(convolve, case, atol):
    """A convolution of `case` (images, size, channels, out channels, kernel, stride, padding), into poisoned memory."""
    n, size, channels, out, kernel, stride, padding = case
    geometry = Geometry(n, channels, *size, out, kernel, stride, padding)
    x, weight, bias = torch.randn(n, geometry.pixels, channels), torch.randn(out, kernel, kernel, channels), torch.randn(out)
    found = torch.full((n, geometry.sites // n, out), float("nan"))
    convolve(x, weight, bias, out=found, geometry=geometry)
    torch.testing.assert_close(found.double(), expected(x, weight, bias, size, stride, padding), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "case",
    [
        (2, (7, 6), 3, 20, 3, 1, SAME),
        (1, (8, 8), 4, 130, 3, 1, SAME),
        (3, (9, 5), 3, 128, 3, 2, UNEVEN),
        (2, (5, 5), 7, 33, 3, 1, NONE),
        (2, (5, 13), 9, 32, 1, 1, NONE),
        (4, (1, 1), 3, 64, 3, 1, SAME),
    ],
)
def test_few_inputs(case):
    check(edges.convolve_few_inputs, case, atol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        (2, (7, 6), 20, 3, 3, 1, SAME),
        (1, (8, 8), 130, 4, 3, 1, SAME),
        (3, (9, 5), 128, 3, 3, 2, UNEVEN),
        (2, (5, 5), 33, 7, 3, 1, NONE),
        (4, (1, 1), 64, 3, 3, 1, SAME),
        (1, (9, 11), 48, 2, 5, 1, (2, 2, 2, 2)),
    ],
)
def test_few_outputs(case):
    check(edges.convolve_few_outputs, case, atol=5e-5)


def test_an_input_of_another_type_is_rounded_to_the_weights():
    x, weight, bias = torch.randn(2, 30, 3), torch.randn(16, 3, 3, 3).half(), torch.randn(16)
    found = torch.full((2, 30, 16), float("nan"))
    edges.convolve_few_inputs(x, weight, bias, out=found, geometry=Geometry(2, 3, 5, 6, 16, 3, 1, SAME))
    torch.testing.assert_close(found.double(), expected(x.half(), weight, bias, (5, 6), 1, SAME), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "other"), [(1, 9), (3, 5)])
def test_a_batch_does_not_change_an_image(n, other):
    x, weight, bias = torch.randn(max(n, other), 35, 3), torch.randn(128, 3, 3, 3), torch.randn(128)
    answers = []
    for images in (n, other):
        wide, narrow = torch.full((images, 35, 128), float("nan")), torch.full((images, 35, 3), float("nan"))
        edges.convolve_few_inputs(x[:images], weight, bias, out=wide, geometry=Geometry(images, 3, 5, 7, 128, 3, 1, SAME))
        back = weight.permute(3, 1, 2, 0).contiguous()
        edges.convolve_few_outputs(wide, back, bias[:3], out=narrow, geometry=Geometry(images, 128, 5, 7, 3, 3, 1, SAME))
        answers.append((wide, narrow))
    least = min(n, other)
    assert all(torch.equal(a[:least], b[:least]) for a, b in zip(*answers, strict=True))


def test_which_layers_are_at_an_edge():
    assert has_few_inputs(3, 3) and has_few_inputs(7, 3) and not has_few_inputs(8, 3) and not has_few_inputs(64, 1)
    assert has_few_outputs(4, 3, 1) and not has_few_outputs(4, 3, 2) and not has_few_outputs(8, 3, 1)
    assert not has_few_outputs(4, 1, 1)  # a product already


@pytest.mark.parametrize(("channels", "out", "taken"), [(3, 32, "inputs"), (32, 3, "outputs"), (32, 32, None)])
def test_they_serve_layers_in_float(channels, out, taken, monkeypatch):
    seen = []
    for edge in ("inputs", "outputs"):
        name = f"convolve_few_{edge}"
        launch = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, edge=edge, launch=launch, **k: seen.append(edge) or launch(*a, **k))
    x, weight, bias = torch.randn(1, 30, channels), torch.randn(out, 3, 3, channels), torch.randn(out)
    found = torch.full((1, 30, out), float("nan"))
    conv.convolve_real([x], weight, bias, found, size=(5, 6), stride=1, padding=SAME)
    assert seen == ([taken] if taken else [])
    torch.testing.assert_close(found.double(), expected(x, weight, bias, (5, 6), 1, SAME), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("channels", "kernel", "role"), [(3, 3, Role.INPUT), (16, 3, Role.INPUT), (16, 1, Role.INPUT), (32, 3, Role.OUTPUT)]
)
def test_the_networks_ends_are_float32_on_a_gpu(channels, kernel, role):
    """The kernels of a GPU on CPU tensors: between layers is float16, but the sampler's image is not."""
    kernels = CudaKernels.__new__(CudaKernels)
    kernels._overlap = False
    out = 4 if role is Role.OUTPUT else 32
    spec = convolution("edge", (channels, 5, 6), out, kernel, role=role)
    x = torch.randn(2, 30, channels) if role is Role.INPUT else torch.randn(2, 30, channels).half()
    weight, bias = torch.randn(out, channels, kernel, kernel).half(), torch.randn(out)
    weight = weight.contiguous(memory_format=torch.channels_last)
    layer = NativeLayer(
        spec, Mode.FLOAT, 8, weight=weight, bias=bias, factors=None, unit=0.0, grid_at=0, scale_at=0, byte_scales=None
    )
    assert kernels.real_channels(spec) == channels
    found = kernels.real_product(layer, [x])
    assert found.dtype == (torch.float16 if role is Role.INPUT else torch.float32)
    exact = expected(x.half(), weight.permute(0, 2, 3, 1), bias, (5, 6), 1, spec.padding)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-2 if role is Role.INPUT else 1e-4)
