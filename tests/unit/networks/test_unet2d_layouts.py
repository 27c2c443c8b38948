"""Networks of every kind that diffusers' UNet2DModel can be: its own answers, and those of our files and integers."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_case
from native_snapped import Snapped
from onnx_lockstep import all_modulated, passes
from small_diffusers import PIXELS, diffusers, random_network

from modiff_trt.export.onnx.network import build_onnx
from modiff_trt.networks.binding import times
from modiff_trt.networks.diffusers_folder import load_folder, read_folder
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.native.cpu_kernels import CpuKernels
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser

THREE = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
LAYOUTS = {
    "diffusers' defaults": {},
    "google/ddpm": {
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    },
    "google/ddpm-256, three levels": THREE
    | {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None, "norm_eps": 1e-6},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "residual blocks that resample": {
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "attention blocks that resample so": THREE | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "odd widths, 16 groups": {"block_out_channels": (48, 80), "norm_num_groups": 16, "attention_head_dim": 16},
    "widths of no multiple of 16, 8 groups": {"block_out_channels": (40, 72), "norm_num_groups": 8, "attention_head_dim": 8},
    "no square": {"sample_size": (8, 12)},
    "many heads": {"attention_head_dim": 4},
    "no attention at all": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    "attention on one side": {"up_block_types": ("UpBlock2D", "UpBlock2D")},
    "one channel": {"in_channels": 1, "out_channels": 1},
    "latents": {"in_channels": 4, "out_channels": 4},
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request, tmp_path_factory):
    """(diffusers' network, ours with its weights) of random weights."""
    folder = tmp_path_factory.mktemp("layout")
    model = random_network("UNet2DModel", PIXELS | LAYOUTS[request.param])
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder)
    found = read_folder(folder)
    network = trace(found.config)
    return model, make_case(network, load_folder(found, network), 5, 2, 5)


def inputs(case, images=2):
    torch.manual_seed(1)
    return torch.randn(images, *case.network.config.input_shape), torch.tensor([3, 981])[:images]


def test_answers_are_those_of_diffusers(layout):
    model, case = layout
    x, t = inputs(case)
    params = case.checkpoint.params
    with torch.no_grad():
        ours = run_unet(case.network, params, x, bound=times(case.network, params, t))
        theirs = model(x, t).sample
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert case.network.parameter_count == sum(p.numel() for p in model.parameters())


def test_the_exported_file_answers_the_same(layout, tmp_path):
    model, case = layout
    file = tmp_path / "float.onnx"
    file.write_bytes(build_onnx(case.network, case.checkpoint, None, "fp32", None).SerializeToString())
    x, t = inputs(case)
    (ours,) = onnxruntime.InferenceSession(file).run(["eps"], {"x": x.numpy(), "t": t.numpy()})
    theirs = model(x, t).sample.detach().numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


def test_native_integers_are_those_of_the_simulation(layout):
    """Every layer quantized, over the passes of a float trajectory. A value at the edge of two steps may round either way,
    which random weights enlarge: that is less than quantization itself."""
    _, case = layout
    scales = case.scales()
    assert len(scales.modulated) > len(case.network.layers) // 2
    native = NativeDenoiser(case.network, case.checkpoint.params, scales, CpuKernels(), "cpu")
    exact, snapped = case.float_denoiser(), Snapped(case, scales)
    x = case.trajectories.x
    for denoiser in (native, snapped):
        denoiser.reset(x.shape[1])
    apart = {"native": [], "quantization": []}
    for row, t in enumerate(scales.rows.t):
        images = x[case.timesteps.index(t)]
        found, expected = (d.to_host(d(d.from_host(images), row)) for d in (native, snapped))
        float_answer = exact.to_host(exact(exact.from_host(images), case.timesteps.index(t)))
        size = np.linalg.norm(float_answer)
        apart["native"].append(np.linalg.norm(found - expected) / size)
        apart["quantization"].append(np.linalg.norm(expected - float_answer) / size)
    assert np.mean(apart["native"]) < np.mean(apart["quantization"]) / 2
    native.reset(1)
    rows = enumerate(scales.rows.t)
    alone = [native.to_host(native(native.from_host(x[case.timesteps.index(t)][:1]), row)) for row, t in rows]
    assert np.array_equal(alone[-1][0], found[0])


def test_the_modulated_file_is_the_simulation(layout):
    _, case = layout
    scales = all_modulated(case)
    model = build_onnx(case.network, case.checkpoint, scales, "fp32", "0" * 64)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for error, lockstep in passes(case, scales, session, range(3)):
        assert error < 1e-4 and lockstep.from_edge < 1e-2
