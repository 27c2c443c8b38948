"""The native backend on a CPU, for real: oneDNN's INT8 convolutions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_case, tiny_config
from small_network import SIZE, random_params, small_function

from modiff_trt.core.kinds import Mode, SolverKind, Spacing
from modiff_trt.core.solvers import Solver
from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import LayerSpec, traced
from modiff_trt.plugins.modulated_conv.libraries.onednn_conv import OneDnnConv
from modiff_trt.plugins.modulated_conv.reference import InputShape
from modiff_trt.runtime.backends.native.cpu_kernels import CpuKernels, _group_norm
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
from modiff_trt.runtime.backends.native.layers import KeptLayers, NativeLayer, build
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory


@pytest.mark.parametrize(
    ("shape", "out", "kernel", "stride", "padding"),
    [
        ((16, 7, 5), 32, 3, 1, (1, 1, 1, 1)),
        ((48, 8, 6), 16, 3, 2, (0, 0, 1, 1)),
        ((32, 5, 9), 96, 1, 1, (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("halves", [True, None])
def test_integer_products_are_exact(shape, out, kernel, stride, padding, halves):
    """Also where pairs of products saturate in 16 bits: there the input is split."""
    spec = LayerSpec("layer", ("layer",), shape, (out, shape[1] // stride, shape[2] // stride), kernel, stride, padding)
    weight = torch.randint(-127, 128, (out, shape[0], kernel, kernel), dtype=torch.int8)
    q = torch.randint(-128, 128, (3, shape[1] * shape[2], shape[0]))
    top, left, bottom, right = padding
    image = q.double().transpose(1, 2).reshape(3, *shape)
    expected = F.conv2d(F.pad(image, (left, right, top, bottom)), weight.double(), stride=stride)
    assert expected.abs().max() < 2**24  # so that float32 holds every sum
    start = torch.randint(-1000, 1000, (3, expected[0, 0].numel(), out)).float()
    result = start.clone()
    conv, stored = OneDnnConv(spec, weight, halves), (q + 128).to(torch.uint8)
    assert conv(stored, 1.0, torch.ones(out), result) is result
    assert torch.equal(result.double(), start.double() + expected.flatten(2).transpose(1, 2))
    bias = torch.randint(-1000, 1000, (out,)).float()
    new = conv(stored, 1.0, torch.ones(out), bias)
    assert new.is_contiguous()
    assert torch.equal(new.double(), bias.double() + expected.flatten(2).transpose(1, 2))


def native(case, scales):
    return NativeDenoiser(case.network, case.checkpoint.params, scales, CpuKernels(), "cpu")


@pytest.mark.parametrize(
    "recipe",
    [
        {"act_bits": 8},
        {"act_bits": 6},
        {"method": "qdiff"},
        {"granularity": "tensor", "act_bits": 6},
        {"granularity": "tensor", "method": "qdiff"},
    ],
)
def test_images_are_those_of_the_simulation(demo, recipe):
    scales = demo.scales(**recipe)
    reference = demo.sample(demo.float_denoiser())
    simulated = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales))
    deployed = demo.sample(native(demo, scales))
    assert psnr(deployed, simulated) > 40
    assert abs(psnr(deployed, reference) - psnr(simulated, reference)) < 0.5


def test_modes_can_be_mixed(tiny):
    scales = with_modes(
        tiny.scales(split=True),
        {"conv_in": "float", "up_blocks.1.resnets.0.conv2": "int8", "up_blocks.0.upsamplers.0.conv": "float"},
    )
    simulated = tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, scales))
    assert psnr(tiny.sample(native(tiny, scales)), simulated) > 20


def test_state_is_reset_between_trajectories_and_batches_do_not_mix(demo):
    denoiser = native(demo, demo.scales())
    first = demo.sample(denoiser, images=3)
    np.testing.assert_array_equal(demo.sample(denoiser, images=3), first)
    assert psnr(demo.sample(denoiser, images=1), first[:1]) > 40


def test_what_stood_in_the_buffers_before_a_trajectory_does_not_matter(demo):
    """On a GPU the passes that capture a graph leave anything there."""
    denoiser = native(demo, demo.scales())
    expected = demo.sample(denoiser, images=2)
    for tensor in (*denoiser._buffers.state.values(), *denoiser._buffers.o_hat.values(), denoiser._x, denoiser._eps):
        tensor.fill_(float("nan"))
    denoiser._counter.zero_()
    denoiser._pass(2)
    np.testing.assert_array_equal(demo.sample(denoiser, images=2), expected)


@pytest.mark.parametrize("images", [1, 3])
def test_images_do_not_depend_on_the_number_of_threads(demo, images, monkeypatch):
    """Which follows what other processes leave free, pass by pass."""
    denoiser = native(demo, demo.scales())
    x = ImageNoise(0, range(images), demo.network.config.input_shape).draw()

    def answers(counts):
        """Of the warm-up passes and some steps, whose input changes as a trajectory's does."""
        turn = itertools.cycle(counts)
        monkeypatch.setattr(denoiser._kernels._free, "update", lambda: next(turn))
        denoiser.reset(images)
        return [denoiser.to_host(denoiser(denoiser.from_host(x * (1 - row / 20)), row)) for row in range(7)]

    one = answers([1])
    assert np.abs(one[-1] - one[0]).max() > 0.1
    np.testing.assert_array_equal(one, answers([2]))
    np.testing.assert_array_equal(one, answers([1, 2, 3]))


@pytest.fixture
def with_threads():
    """What a call gives with one thread, and whether with other numbers it gives the same."""
    threads = torch.get_num_threads()

    def call(function):
        torch.set_num_threads(1)
        expected = function()
        for number in (2, 3, 8, 16):
            torch.set_num_threads(number)
            assert torch.equal(function(), expected), number
        return expected

    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("images", "height", "width"), [(3, 40, 32), (1, 32, 32), (1, 37, 41), (1, 5, 300)])
def test_group_norm_of_large_images_is_torch_s(with_threads, images, height, width):
    x, gain, bias = torch.randn(images, height * width, 96), torch.randn(96), torch.randn(96)
    image = x.double().transpose(1, 2)
    expected = F.group_norm(image, 32, gain.double(), bias.double(), 1e-6).transpose(1, 2)
    found = with_threads(lambda: _group_norm(x, InputShape(96, 0, height, width), 32, gain, bias, 1e-6))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    alone = _group_norm(x[:1], InputShape(96, 0, height, width), 32, gain, bias, 1e-6)
    assert torch.equal(alone, found[:1])


@pytest.mark.parametrize(
    ("kernel", "channels", "out", "size"),
    [(1, (1280,), 320, 8), (1, (768, 384), 640, 9), (1, (300,), 16, 5), (3, (128,), 512, 12), (3, (512,), 96, 4)],
)
@pytest.mark.parametrize("images", [1, 2])
def test_products_in_float_do_not_depend_on_the_number_of_threads(with_threads, kernel, channels, out, size, images):
    """Shapes whose sums libraries divide among threads."""
    padding = (kernel // 2,) * 4
    spec = LayerSpec("layer", ("layer",), (sum(channels), size, size), (out, size, size), kernel, 1, padding)
    weight, bias = torch.randn(out, sum(channels), kernel, kernel), torch.randn(out)
    layer = NativeLayer(
        spec, Mode.FLOAT, 8, weight=weight, bias=bias, factors=None, unit=0.0, grid_at=0, scale_at=0, byte_scales=None
    )
    sources = [torch.randn(images, size * size, count) for count in channels]
    found = with_threads(lambda: CpuKernels().real_product(layer, sources))
    image = torch.cat(sources, 2).double().transpose(1, 2).view(images, -1, size, size)
    expected = F.conv2d(image, weight.double(), bias.double(), padding=kernel // 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_start_does_not_depend_on_the_number_of_threads(demo):
    threads, models = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        models.append(build(demo.network, demo.checkpoint.params, demo.scales()))
    torch.set_num_threads(threads)
    one, three = models
    assert torch.equal(one.table, three.table)
    for name, start in one.start.items():
        assert all(map(torch.equal, start, three.start[name])), name


@pytest.mark.parametrize("others", ["modes", "another network of the same names", "other steps", "still"])
def test_layers_that_are_kept_are_those_that_would_be_made(demo, others):
    """After the first scales only what differs is packed, and nothing else may differ from packing all anew."""
    scales, kept = demo.scales(), KeptLayers()
    parts = demo.network, demo.checkpoint.params
    first = build(*parts, scales, kept)
    name = scales.modulated[3]
    changed = {
        "modes": with_modes(scales, {name: Mode.INT8, scales.modulated[5]: Mode.FLOAT}),
        "another network of the same names": replace(scales, layers={n: replace(v) for n, v in scales.layers.items()}),
        "other steps": replace(scales, rows=replace(scales.rows, multipliers=scales.rows.multipliers * 2)),
        "still": replace(scales, dither=False),
    }[others]
    found, anew = build(*parts, changed, kept), build(*parts, changed)
    assert torch.equal(found.table, anew.table) and found.start.keys() == anew.start.keys()
    for n, start in anew.start.items():
        assert all(map(torch.equal, start, found.start[n])), n
    for n, layer in anew.layers.items():
        other = found.layers[n]
        assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)
        for field in ("mode", "bits", "unit", "grid_at", "scale_at", "bias_at", "zero_point", "dynamic"):
            assert getattr(other, field) == getattr(layer, field), (n, field)
    shared = [n for n, layer in found.layers.items() if layer.weight is first.layers[n].weight]
    assert others != "modes" or (len(shared) == len(found.layers) - 2 and name not in shared)
    assert others not in ("another network of the same names", "still") or not shared
    again = build(*parts, scales, kept)
    assert all(again.layers[n].weight is layer.weight for n, layer in first.layers.items())


def test_denoisers_that_share_layers_make_the_images_of_their_own(demo):
    """Of several modes, run in turn; what they share is on the device once, and no run writes to it."""
    parts = demo.network, demo.checkpoint.params
    scales = demo.scales()
    few = with_modes(scales, {scales.modulated[3]: Mode.INT8, scales.modulated[5]: Mode.FLOAT})
    shortcut = next(spec for spec in demo.network.layers if spec.added_to in scales.modulated)
    apart = with_modes(scales, {shortcut.added_to: Mode.INT8})  # no longer one accumulator
    make, x = trained.alike_natives(*parts), torch.randn(2, *demo.network.config.input_shape).numpy()
    denoisers = [make(chosen) for chosen in (scales, few, apart)]
    for chosen, denoiser in [*zip((scales, few, apart), denoisers, strict=True), (scales, denoisers[0])]:
        expected = sample_trajectory(trained.native(*parts, chosen), demo.updates(), x)
        np.testing.assert_array_equal(sample_trajectory(denoiser, demo.updates(), x), expected)
    first, second = (denoiser._model.layers for denoiser in denoisers[:2])
    assert [n for n in first if first[n].weight is not second[n].weight] == [scales.modulated[3], scales.modulated[5]]
    name = scales.modulated[0]
    assert denoisers[0]._start[name][0] is denoisers[1]._start[name][0]


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("kind", SolverKind)
def test_the_device_s_update_is_the_sampler_s(kind, clip):
    """Every solver, clipped or not: what the row's numbers do inside the step, and outside of it. The second trajectory shows
    that nothing of the first is left."""
    solver = Solver(kind, Spacing.LOGSNR, clip_sample=clip)
    network = traced(tiny_config(SIZE, (1,), ()), small_function)
    case = make_case(network, Checkpoint(random_params(network), "random-0", ""), 4, 2, 4, solver)
    denoiser = native(case, case.scales())
    x = torch.randn(2, 3, SIZE, SIZE).numpy()
    stepwise = sample_trajectory(denoiser, case.updates(), x, on_pass=lambda *_: None)
    for _ in range(2):
        np.testing.assert_allclose(sample_trajectory(denoiser, case.updates(), x), stepwise, rtol=1e-4, atol=1e-4)
    other = Solver(kind, Spacing.LOGSNR, clip_sample=0.1).updates(network.config.diffusion, case.timesteps)
    elsewhere = sample_trajectory(denoiser, other, x)  # not those of its graph: it runs step by step
    assert np.abs(elsewhere - stepwise).max() > 1e-2
