"""The INT8 convolution and the plugin's first launch, in Triton's interpreter, against float64."""

from dataclasses import replace

import pytest
import torch

from modiff_trt.core.errors import InputError
from modiff_trt.plugins.modulated_conv import reference
from modiff_trt.plugins.modulated_conv.geometry import RESIDUAL_TILE, ConvTile, Geometry, conv_tile, tiles_to_time
from modiff_trt.plugins.modulated_conv.kernels import conv as conv
from modiff_trt.plugins.modulated_conv.kernels.residual import residual_kernel

# N, C, H, W, K, kernel, stride, padding: odd images, channels that no tile divides, sums in parts, a strided window
SHAPES = [
    (2, 128, 6, 6, 64, 3, 1, (1, 1, 1, 1)),
    (1, 96, 8, 5, 32, 3, 2, (0, 0, 1, 1)),
    (3, 32, 4, 4, 48, 1, 1, (0, 0, 0, 0)),
    (1, 128, 4, 4, 40, 3, 1, (1, 1, 1, 1)),
    (2, 32, 9, 7, 3, 3, 1, (1, 1, 1, 1)),
]


@pytest.fixture
def scratch():
    return conv.Scratch("cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_reference(shape, bias, scratch):
    n, c, h, w, k, r, stride, padding = shape
    geometry = Geometry(n, c, h, w, k, r, stride, padding)
    sites = geometry.out_size[0] * geometry.out_size[1]
    q = torch.randint(-128, 128, (n, h * w, c), dtype=torch.int8)
    weight = torch.randint(-128, 128, (k, r, r, c), dtype=torch.int8)
    scale, out = torch.rand(k) * 1e-4, torch.full((n, sites, k), float("nan"))
    addend = torch.randn(k) if bias else torch.randn(n, sites, k)
    conv.convolve_int8(q, weight, scale, addend, out, size=(h, w), stride=stride, padding=padding, scratch=scratch)
    wide = (t.double() for t in (q, weight.permute(0, 3, 1, 2), scale, addend))
    expected = reference.accumulate(*wide, (h, w), stride, padding)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    again = torch.full_like(out, float("nan"))  # what the first launch left behind must not show
    conv.convolve_int8(q, weight, scale, addend, again, size=(h, w), stride=stride, padding=padding, scratch=scratch)
    assert torch.equal(again, out)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_each_image_may_have_a_step_of_its_own(shape, scratch):
    n, c, h, w, k, r, stride, padding = shape
    out_h, out_w = Geometry(n, c, h, w, k, r, stride, padding).out_size
    q = torch.randint(-128, 128, (n, h * w, c), dtype=torch.int8)
    weight = torch.randint(-128, 128, (k, r, r, c), dtype=torch.int8)
    scale, steps, o_hat = torch.rand(k) * 1e-3, torch.rand(n) + 0.1, torch.randn(n, out_h * out_w, k)
    out = o_hat.clone()
    window = {"size": (h, w), "stride": stride, "padding": padding}
    conv.convolve_int8(q, weight, scale, out, out, scratch=scratch, steps=steps, **window)
    for i in range(n):
        wide = (t.double() for t in (q[i : i + 1], weight.permute(0, 3, 1, 2), scale * steps[i], o_hat[i : i + 1]))
        expected = reference.accumulate(*wide, (h, w), stride, padding)
        torch.testing.assert_close(out[i : i + 1].double(), expected, rtol=1e-6, atol=2e-4)


def test_neither_tile_nor_split_changes_a_bit(scratch):
    q = torch.randint(-128, 128, (2, 36, 64), dtype=torch.int8)
    weight, scale = torch.randint(-128, 128, (48, 3, 3, 64), dtype=torch.int8), torch.rand(48)
    o_hat, results = torch.randn(2, 36, 48), []
    for tile in (ConvTile(16, 32, 32, 2, 2, 9), ConvTile(64, 64, 64, 3, 4, 1), ConvTile(32, 16, 64, 2, 4, 3)):
        out = o_hat.clone()  # in place, as in deployment
        window = {"size": (6, 6), "stride": 1, "padding": (1, 1, 1, 1)}
        conv.convolve_int8(q, weight, scale, out, out, scratch=scratch, tile=tile, **window)
        results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_tiles_fill_a_gpu_before_they_grow():
    one = conv_tile(Geometry(1, 256, 8, 8, 256, 3, 1, (1, 1, 1, 1)))
    many = conv_tile(Geometry(256, 256, 32, 32, 256, 3, 1, (1, 1, 1, 1)))
    assert one.split > 1 and one.sites < many.sites and many.split == 1
    assert conv_tile(Geometry(1, 256, 8, 8, 256, 3, 1, (1, 1, 1, 1)), may_split=False).split == 1
    assert tiles_to_time(Geometry(256, 256, 32, 32, 256, 3, 1, (1, 1, 1, 1))) == [many]
    # Stable Diffusion's smallest images: long sums, of which a GPU holds more programs than one tile each makes.
    whole, parts = tiles_to_time(Geometry(2, 1280, 8, 8, 1280, 3, 1, (1, 1, 1, 1)))
    assert (whole.split, parts.split) == (1, 3) and replace(parts, split=1) == whole
    with pytest.raises(InputError, match="a smaller one"):
        _ = Geometry(10_000, 512, 32, 32, 512, 3, 1, (1, 1, 1, 1)).constants


@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_plugin_launches_it(shape):
    """Channels first, o_hat in place, half-precision scales, and the grid's step from two numbers on the device."""
    n, c, h, w, k, r, stride, padding = shape
    geometry = Geometry(n, c, h, w, k, r, stride, padding)
    tile, (p, q) = conv_tile(geometry, may_split=False), geometry.out_size
    integers = torch.randint(-128, 128, (n, h * w, c), dtype=torch.int8)
    weight = torch.randint(-128, 128, (k, r, r, c), dtype=torch.int8)
    scale, step, multiplier = (torch.rand(k) * 1e-3).half(), torch.tensor(0.0625).half(), torch.tensor(1.5).half()
    o_hat = torch.randn(n, k, p * q)
    found = o_hat.clone()
    grid = (-(-geometry.sites // tile.sites), -(-k // tile.channels), 1)
    conv.conv_kernel[grid](
        integers, integers, weight, scale, found, found, step, multiplier, integers, integers, geometry.sites,
        **geometry.constants, C2=0, INTEGER=True, BIAS=False, STEP=1, CHANNELS_FIRST=True, SPLIT=1, OVERLAP=False,
        BLOCK_M=tile.sites, BLOCK_N=tile.channels, BLOCK_K=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    wide = scale.double() * float(step) * float(multiplier)
    inputs = integers.double(), weight.permute(0, 3, 1, 2).double(), wide, o_hat.transpose(1, 2).double()
    expected = reference.accumulate(*inputs, (h, w), stride, padding).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("channels", "size"), [(48, (5, 7)), (3, (9, 4)), (70, (8, 8))])
def test_the_residual_is_rounded_and_a_hat_follows(channels, size):
    n, pixels = 2, size[0] * size[1]
    padded, step, multiplier = -(-channels // 32) * 32, torch.tensor(0.02), torch.tensor(1.5)
    x, a_hat = torch.randn(2, n, channels, pixels)
    low, high = -8, 7
    q = torch.full((n, pixels, padded), 77, dtype=torch.int8)
    state = a_hat.clone()
    block_p, block_c, warps = RESIDUAL_TILE
    residual_kernel[(-(-pixels // block_p), -(-padded // block_c), n)](
        x, state, state, step, multiplier, q, pixels, channels, padded, float(low), float(high),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip
    width = float(step * multiplier)
    position = ((x.double() - a_hat.double()) / width).clamp(low, high).transpose(1, 2)
    assert float((q[:, :, :channels].double() - position).abs().max()) <= 0.5 + 1e-4
    assert (q[:, :, channels:] == 0).all()  # the padding takes part in the product
    torch.testing.assert_close(state, a_hat + width * q[:, :, :channels].transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("second", [0, 48])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, (0, 0, 0, 0)), (3, 2, (0, 0, 1, 1)), (3, 1, (1, 1, 1, 1))])
def test_layers_in_float_take_two_sources(second, kernel, stride, padding):
    n, (h, w), k = 2, (7, 6), 20
    sources = [torch.randn(n, h * w, c) for c in (32, second) if c]
    channels = 32 + second
    weight, bias = torch.randn(k, kernel, kernel, channels) / channels, torch.randn(k)
    size = Geometry(n, 32, h, w, k, kernel, stride, padding).out_size
    out = torch.full((n, size[0] * size[1], k), float("nan"))
    conv.convolve_real(sources, weight, bias, out, size=(h, w), stride=stride, padding=padding)
    x, ones = torch.cat(sources, dim=2).double(), torch.ones(k, dtype=torch.float64)
    expected = reference.accumulate(x, weight.permute(0, 3, 1, 2).double(), ones, bias.double(), (h, w), stride, padding)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
