"""The native backend on an NVIDIA GPU: kernels against float64, integer products exactly, images against the simulation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import CASES, PIXEL_CASES, check, check_pixels

from modiff_trt.core.kinds import Mode
from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernels():
    from modiff_trt.runtime.backends.native.cuda_kernels import CudaKernels

    return CudaKernels()


def native(case, scales, kernels):
    from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser

    return NativeDenoiser(case.network, case.checkpoint.params, scales, kernels, "cuda")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("overlap", [False, True])
def test_kernel_equals_the_reference(name, overlap):
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches overlap from compute capability 9.0 on")
    check(CASES[name], "cuda", overlap)


@pytest.mark.parametrize("name", PIXEL_CASES)
@pytest.mark.parametrize("overlap", [False, True])
def test_inputs_of_transformer_layers_equal_float64(name, overlap):
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches overlap from compute capability 9.0 on")
    check_pixels(PIXEL_CASES[name], "cuda", overlap)


@pytest.mark.parametrize(
    ("channels", "size", "out", "kernel", "stride", "padding"),
    [
        (128, (32, 32), 128, 3, 1, (1, 1, 1, 1)),
        (48, (9, 7), 16, 3, 1, (1, 1, 1, 1)),
        (256, (8, 8), 256, 3, 2, (0, 0, 1, 1)),
        (16, (5, 5), 96, 1, 1, (0, 0, 0, 0)),
    ],
)
def test_integer_products_are_exact(channels, size, out, kernel, stride, padding):
    """With scale 1 and a float32 accumulator every sum is an integer that float32 holds."""
    from modiff_trt.plugins.modulated_conv.libraries.cudnn_conv import ConvSpec, Int8Conv

    spec = ConvSpec(3, channels, *size, out, kernel, stride, padding, torch.float32)
    conv = Int8Conv(spec)
    q = torch.randint(-128, 128, (3, *size, channels), dtype=torch.int8, device="cuda")
    weight = torch.randint(-50, 51, (out, channels, kernel, kernel), dtype=torch.int8, device="cuda")
    weight = weight.contiguous(memory_format=torch.channels_last)
    top, left, bottom, right = padding
    image = F.pad(q.cpu().double().permute(0, 3, 1, 2), (left, right, top, bottom))
    expected = F.conv2d(image, weight.cpu().double(), stride=stride)
    assert expected.abs().max() < 2**24
    start = torch.randint(-1000, 1000, expected.shape, device="cuda").float().contiguous(memory_format=torch.channels_last)
    result = start.clone()
    workspace = torch.empty(max(conv.workspace_size, 1), dtype=torch.uint8, device="cuda")
    conv.run(q, weight, torch.ones(out, device="cuda"), result, result, workspace)
    assert torch.equal(result.cpu().double(), start.cpu().double() + expected)


@pytest.mark.parametrize(
    "recipe", [{"act_bits": 8}, {"act_bits": 6}, {"act_bits": 8, "min_intensity": 256.0}, {"method": "qdiff"}]
)
def test_images_are_those_of_the_simulation(demo, kernels, recipe):
    scales = demo.scales(**recipe)
    reference = demo.sample(demo.float_denoiser())
    simulated = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales, "cuda"))
    deployed = demo.sample(native(demo, scales, kernels))
    assert abs(psnr(deployed, reference) - psnr(simulated, reference)) < 0.5
    assert psnr(deployed, simulated) > 38


def test_networks_that_share_their_products_have_images_of_their_own(demo, kernels):
    from modiff_trt.runtime.backends.registry.trained import alike_natives

    scales = demo.scales()
    others = with_modes(scales, dict.fromkeys(scales.modulated[::2], Mode.INT8))
    make = alike_natives(demo.network, demo.checkpoint.params, "cuda")
    first, second = make(scales), make(others)
    images = demo.sample(first)
    np.testing.assert_array_equal(demo.sample(second), demo.sample(native(demo, others, kernels)))
    np.testing.assert_array_equal(demo.sample(first), images)
    assert not np.array_equal(demo.sample(second), images)


@pytest.mark.parametrize(
    ("batch", "channels", "size", "out"),
    [(1, 128, 32, 128), (2, 128, 32, 128), (1, 512, 16, 256), (1, 256, 8, 256), (3, 96, 9, 48)],
)
def test_our_own_integer_products_are_exact(batch, channels, size, out):
    """Every tile that small batches take, against the CPU: ptxas has assembled one wrongly."""
    from modiff_trt.plugins.modulated_conv.kernels.conv import Scratch, convolve_int8

    q = torch.randint(-128, 128, (batch, size * size, channels), dtype=torch.int8)
    weight = torch.randint(-50, 51, (out, 3, 3, channels), dtype=torch.int8)
    image = q.view(batch, size, size, channels).permute(0, 3, 1, 2).double()
    expected = F.conv2d(image, weight.permute(0, 3, 1, 2).double(), padding=1).flatten(2).transpose(1, 2)
    for overlap in (False, torch.cuda.get_device_capability() >= (9, 0)):
        found = torch.full((batch, size * size, out), float("nan"), device="cuda")
        bias, scale = torch.zeros(out, device="cuda"), torch.ones(out, device="cuda")
        window = {"size": (size, size), "stride": 1, "padding": (1, 1, 1, 1)}
        convolve_int8(q.cuda(), weight.cuda(), scale, bias, found, scratch=Scratch("cuda"), overlap=overlap, **window)
        assert torch.equal(found.cpu().double(), expected)


@pytest.mark.parametrize("channels", [(256,), (256, 128)])
def test_products_of_many_pixels_are_those_of_few(channels):
    """A layer takes one kernel or the other by the number of its pixels; an image must not tell which."""
    from modiff_trt.plugins.modulated_conv.kernels.conv import convolve_real
    from modiff_trt.plugins.modulated_conv.kernels.product import multiply_real

    n, pixels, out = 7, 301, 768
    sources = [torch.randn(n, pixels, c, device="cuda").half() for c in channels]
    weight = (torch.randn(out, sum(channels), device="cuda") / 16).half()
    bias = torch.randn(out, device="cuda")
    window = {"size": (1, pixels), "stride": 1, "padding": (0, 0, 0, 0)}
    for overlap in (False, torch.cuda.get_device_capability() >= (9, 0)):
        few, many = (torch.full((n, pixels, out), float("nan"), device="cuda").half() for _ in range(2))
        convolve_real(sources, weight.view(out, 1, 1, -1), bias, few, overlap=overlap, **window)
        multiply_real(sources, weight, bias, many, overlap=overlap)
        assert torch.equal(few, many)
        expected = torch.cat(sources, 2).double() @ weight.double().T + bias.double()
        torch.testing.assert_close(many.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("few", "many", "size"), [(3, 128, 32), (4, 320, 64), (5, 72, 7)])
@pytest.mark.parametrize("n", [1, 5])
def test_edges_equal_float64_and_batches_do_not_change_an_image(few, many, size, n):
    from modiff_trt.plugins.modulated_conv.geometry import Geometry
    from modiff_trt.plugins.modulated_conv.kernels import edges

    same = (1, 1, 1, 1)
    for overlap in (False, torch.cuda.get_device_capability() >= (9, 0)):
        for c, k, convolve, real in (
            (few, many, edges.convolve_few_inputs, torch.float16),
            (many, few, edges.convolve_few_outputs, torch.float32),
        ):
            x = torch.randn(n, size * size, c, device="cuda").half()
            weight, bias = (torch.randn(k, 3, 3, c, device="cuda") / 8).half(), torch.randn(k, device="cuda")
            answers = []
            for images in (n, 1):
                found = torch.full((images, size * size, k), float("nan"), device="cuda", dtype=real)
                geometry = Geometry(images, c, size, size, k, 3, 1, same)
                convolve(x[:images], weight, bias, out=found, geometry=geometry, overlap=overlap)
                answers.append(found)
            together, alone = answers
            assert torch.equal(together[:1], alone)
            image = x.double().view(n, size, size, c).permute(0, 3, 1, 2)
            expected = F.conv2d(image, weight.double().permute(0, 3, 1, 2), bias.double(), padding=1).flatten(2).transpose(1, 2)
            torch.testing.assert_close(together.double(), expected, rtol=1e-3, atol=1e-3 if real is torch.float16 else 1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_only_a_1x1_without_stride_is_a_product_of_many_pixels(stride, monkeypatch):
    from modiff_trt.plugins.modulated_conv.kernels import conv as conv_kernel

    taken = []
    multiply = conv_kernel.multiply_real
    monkeypatch.setattr(conv_kernel, "multiply_real", lambda *args, **kwargs: taken.append(multiply(*args, **kwargs)))
    n, size, c, out = 67, 32, 64, 128
    x, weight = torch.randn(n, size * size, c, device="cuda").half(), (torch.randn(out, 1, 1, c, device="cuda") / 8).half()
    found = torch.full((n, (size // stride) ** 2, out), float("nan"), device="cuda").half()
    window = {"size": (size, size), "stride": stride, "padding": (0, 0, 0, 0)}
    overlap = torch.cuda.get_device_capability() >= (9, 0)
    conv_kernel.convolve_real([x], weight, torch.zeros(out, device="cuda"), found, overlap=overlap, **window)
    assert len(taken) == (overlap and stride == 1)
    used = x.double().view(n, size, size, c)[:, ::stride, ::stride].flatten(1, 2)
    torch.testing.assert_close(found.double(), used @ weight.double().view(out, c).T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", [{}, {"min_intensity": 200.0}])
def test_replays_follow_rows_and_batches_do_not_change_an_image(demo, kernels, recipe):
    denoiser = native(demo, demo.scales(**recipe), kernels)
    x = ImageNoise(0, range(5), demo.network.config.input_shape).draw()
    together = denoiser.trajectory(x)
    np.testing.assert_array_equal(denoiser.trajectory(x), together)
    np.testing.assert_array_equal(denoiser.trajectory(x[:1]), together[:1])
    assert np.isfinite(together).all()


@pytest.mark.parametrize("recipe", [{}, {"method": "qdiff"}, {"granularity": "tensor"}, {"min_intensity": 200.0}])
def test_many_images_are_the_same_every_time(demo, kernels, recipe):
    """Shortcuts in float run beside their block's convolutions; a race between launches would show in some images of some
    runs."""
    denoiser = native(demo, demo.scales(**recipe), kernels)
    x = ImageNoise(0, range(500), demo.network.config.input_shape).draw()
    first = denoiser.trajectory(x)
    for _ in range(4):
        np.testing.assert_array_equal(denoiser.trajectory(x), first)
    np.testing.assert_array_equal(denoiser.trajectory(x[:40]), first[:40])


@pytest.mark.parametrize("recipe", [{}, {"min_intensity": 200.0}, {"granularity": "tensor"}])
def test_launches_that_begin_early_change_nothing(demo, kernels, recipe):
    from modiff_trt.runtime.backends.native.cuda_kernels import CudaKernels

    waiting = CudaKernels(overlap=False)
    x = ImageNoise(0, range(2), demo.network.config.input_shape).draw()
    scales = demo.scales(**recipe)
    expected = native(demo, scales, waiting).trajectory(x)
    np.testing.assert_array_equal(native(demo, scales, kernels).trajectory(x), expected)


@pytest.mark.parametrize("passes", [2, 1000])
def test_a_capture_keeps_no_copy_of_the_state(demo, kernels, passes, monkeypatch):
    from modiff_trt.runtime.backends.native import denoiser as native_denoiser

    monkeypatch.setattr(native_denoiser, "REFRESH", passes)
    denoiser, images = native(demo, demo.scales(), kernels), 128
    state = images * sum(info.nbytes for info in denoiser.state_info)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    denoiser.reset(images)
    assert state < torch.cuda.max_memory_allocated() - before < 1.7 * state


def test_grids_that_follow_each_image_give_the_simulation_s_images(demo, kernels):
    scales = demo.scales(granularity="tensor", act_bits=6)
    simulated = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales, "cuda"))
    assert psnr(demo.sample(native(demo, scales, kernels)), simulated) > 38


def test_shortcuts_beside_change_nothing(demo, kernels, monkeypatch):
    from modiff_trt.runtime.backends.native import denoiser as native_denoiser

    scales = demo.scales(min_intensity=200.0)
    deployed = demo.sample(native(demo, scales, kernels))
    monkeypatch.setattr(native_denoiser.NativeDenoiser, "_side", None)
    np.testing.assert_array_equal(demo.sample(native(demo, scales, kernels)), deployed)


@pytest.mark.parametrize("recipe", [{}, {"min_intensity": 200.0}, {"granularity": "tensor"}])
def test_sums_are_computed_anew_on_the_way(demo, kernels, recipe, monkeypatch):
    from modiff_trt.runtime.backends.native import denoiser as native_denoiser

    monkeypatch.setattr(native_denoiser, "REFRESH", 2)
    scales, x = demo.scales(**recipe), ImageNoise(0, range(160), demo.network.config.input_shape).draw()
    denoiser = native(demo, scales, kernels)
    many = denoiser.trajectory(x)
    for images in (1, 40, 160):
        np.testing.assert_array_equal(denoiser.trajectory(x[:images]), many[:images])
    simulated = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales, "cuda"))
    assert psnr(demo.sample(denoiser), simulated) > 38  # called row by row
    # What a graph computes of the last state is what the passes have summed up, and the same every time.
    sums = {name: out.float() for name, out in denoiser._buffers.o_hat.items()}
    graph = denoiser._refreshes[max(denoiser._refreshes)]
    graph.replay()
    anew = {name: out.clone() for name, out in denoiser._buffers.o_hat.items()}
    for name, out in anew.items():
        bound = 2**-8 * float(out.abs().max())
        torch.testing.assert_close(out.float(), sums[name], rtol=0, atol=bound)
    # Many times: a product that begins before the one that it adds to is through would be wrong in some.
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        graph.replay()
        for name, out in anew.items():
            wrong += (denoiser._buffers.o_hat[name] != out).any()
    assert wrong == 0
    name = next(name for name in denoiser._buffers.o_hat if name not in denoiser._shared)
    denoiser._buffers.o_hat[name][0, 0, 0] = float("inf")
    graph.replay()
    assert not denoiser._buffers.o_hat[name][0, 0, 0].isfinite()
