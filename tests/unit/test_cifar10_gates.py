"""What the method must show on a trained CIFAR-10 network of full size: 50 quad steps, 4 images, W8 nearest rounding.

Needs a checkpoint (MODIFF_CIFAR10_CKPT, see conftest) and about four minutes on two cores.
"""

import numpy as np
import pytest
import torch
from conftest import ROOT, make_case
from reference import ReferenceUNet, linear_alpha_bar, reference_ddim

from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.networks.checkpoint import load_checkpoint
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.tools.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cifar10(full_checkpoint):
    network = trace(load_config(ROOT / "configs/cifar10.yml"))
    return make_case(network, load_checkpoint(full_checkpoint, network), 20, 3, 8)


@pytest.fixture(scope="module")
def decibels(cifar10):
    """PSNR by (method, bits, start) to FP32, or to the images of `to`; "weights" quantizes weights alone."""
    found = {"float": cifar10.sample(cifar10.float_denoiser(), images=2)}

    def images(method, bits, start):
        key = (method, bits, start)
        if key not in found:
            scales = cifar10.scales(method="modiff" if method == "weights" else method, act_bits=bits, start=start)
            denoiser = SimDenoiser(cifar10.network, cifar10.checkpoint.params, scales, act_quant=method != "weights")
            found[key] = cifar10.sample(denoiser, images=2)
        return found[key]

    def measure(method, bits, start="warmup", to="float"):
        reference = found["float"] if to == "float" else images(to, 8, "warmup")
        value = psnr(images(method, bits, start), reference)
        print(f"{method} A{bits} {start}: {value:.2f} dB to {to}")  # noqa: T201 (shown with -s)
        return value

    return measure


def test_modiff_is_near_quantized_weights_alone(decibels):
    weights = decibels("weights", 8)
    assert weights > 30
    assert decibels("modiff", 8) > weights - 0.3
    assert decibels("modiff", 6) > weights - 2.5


def test_modiff_is_far_above_stateless_quantization(decibels):
    """Beside the images of the same rounded weights: to FP32 the weights' error is most of MoDiff's at 6 bits."""
    assert decibels("modiff", 6, to="weights") > decibels("qdiff", 6, to="weights") + 8
    assert decibels("modiff", 4) > decibels("qdiff", 4) + 10


def test_two_warmup_rows_replace_the_full_precision_first_step(decibels):
    assert decibels("modiff", 8) > decibels("modiff", 8, "exact") - 0.2


def test_sample_equals_an_independent_float64_evaluation(full_checkpoint, tmp_path):
    noise = ImageNoise(11, range(1), (3, 32, 32)).draw()
    np.save(tmp_path / "x.npy", noise)
    options = ["--timesteps", "10", "--skip-type", "quad", "--num-samples", "1", "--noise", str(tmp_path / "x.npy")]
    model = ["--config", str(ROOT / "configs/cifar10.yml"), "--ckpt", str(full_checkpoint)]
    with pytest.raises(SystemExit) as ended:
        main(["sample", "--backend", "torch", *model, *options, "--out", str(tmp_path / "s.npz")])
    assert ended.value.code == 0
    from safetensors.torch import load_file

    unet = ReferenceUNet({k: v.double() for k, v in load_file(full_checkpoint).items()}, 128)
    sequence = [int(s) for s in np.linspace(0, np.sqrt(800), 10) ** 2]
    expected = reference_ddim(unet, torch.from_numpy(noise).double(), sequence, linear_alpha_bar()).numpy()
    with np.load(tmp_path / "s.npz") as archive:
        assert np.linalg.norm(archive["samples"] - expected) / np.linalg.norm(expected) < 1e-4
