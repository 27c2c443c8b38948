"""The torch backends and calibration give on an NVIDIA GPU what they give on the CPU."""

import numpy as np
import pytest

from modiff_trt.export.calibration.ranges import measure_ranges
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser, TorchDenoiser, full_precision
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory

pytestmark = pytest.mark.gpu


def sample(case, denoiser):
    x = ImageNoise(0, range(4), case.network.config.input_shape).draw()
    return sample_trajectory(denoiser, case.updates(), x)


def test_full_precision_agrees(demo):
    on_gpu = sample(demo, TorchDenoiser(demo.network, demo.checkpoint.params, demo.timesteps, "cuda"))
    on_cpu = sample(demo, demo.float_denoiser())
    assert np.linalg.norm(on_gpu - on_cpu) / np.linalg.norm(on_cpu) < 1e-4


def test_simulation_agrees(demo):
    scales = demo.scales(act_bits=6)
    on_gpu, on_cpu = (sample(demo, SimDenoiser(demo.network, demo.checkpoint.params, scales, d)) for d in ("cuda", "cpu"))
    assert psnr(on_gpu, on_cpu) > 40


def test_ranges_agree(tiny):
    params = {k: v.cuda() for k, v in tiny.checkpoint.params.items()}
    with full_precision():
        ranges = measure_ranges(tiny.network, params, tiny.trajectories, 3)
    for name, found in ranges.items():
        assert found.residual.absmax == pytest.approx(tiny.ranges[name].residual.absmax, rel=1e-3)
        assert found.residual.mse_scale(6) == pytest.approx(tiny.ranges[name].residual.mse_scale(6), rel=0.1)
