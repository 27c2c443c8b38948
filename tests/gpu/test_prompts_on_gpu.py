"""A trained network with prompts and guidance on an NVIDIA GPU: a whole captured trajectory against the simulation."""

import re

import numpy as np
import pytest
import torch
from command import run
from conftest import ROOT, Case, make_case

from modiff_trt.core.context import load_context
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.registry.options import default_solver, load_model
from modiff_trt.runtime.backends.registry.trained import native
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory

pytestmark = pytest.mark.gpu

MODEL, STEPS, GUIDANCE = ROOT / "calib_cache/demo_classes", 50, 2.0


@pytest.fixture(scope="module")
def classes() -> Case:
    network, checkpoint = load_model(None, None, None, model=MODEL)
    context = load_context(MODEL / "classes.npz", GUIDANCE, network.config.architecture)
    return make_case(network, checkpoint, STEPS, 6, 10, default_solver(None, MODEL), context)


def simulated(case: Case, scales, images: range) -> np.ndarray:
    denoiser = SimDenoiser(case.network, case.checkpoint.params, scales, "cuda")
    x, lines = noise(case, images), case.trajectories.context.of(images)
    return sample_trajectory(guided(denoiser, case.trajectories.context), case.updates(), x, context=lines)


def noise(case: Case, images: range) -> np.ndarray:
    return ImageNoise(7, images, case.network.config.input_shape).draw()


def captured(case: Case, scales):
    return native(case.network, case.checkpoint.params, scales, "cuda", guidance=GUIDANCE)


@pytest.mark.parametrize("recipe", [{}, {"min_intensity": 200.0}, {"method": "qdiff"}])
def test_fifty_captured_passes_are_the_simulation(classes, recipe):
    """Judged by the distance to full precision: another order of sums moves single pixels, not the error."""
    images, scales = range(32), classes.scales(**recipe)
    reference = sample_trajectory(
        guided(classes.float_denoiser(), classes.trajectories.context),
        classes.updates(),
        noise(classes, images),
        context=classes.trajectories.context.of(images),
    )
    deployed = captured(classes, scales).trajectory(noise(classes, images), context=classes.trajectories.context.of(images))
    by_simulation, by_graph = (psnr(found, reference) for found in (simulated(classes, scales, images), deployed))
    assert abs(by_simulation - by_graph) < 0.2, f"simulation {by_simulation:.2f} dB, captured {by_graph:.2f} dB"
    assert by_graph > 20


@pytest.mark.parametrize("recipe", [{}, {"min_intensity": 200.0}])
def test_sixteen_prompts_are_sampled_as_four_and_one(classes, recipe):
    denoiser, context = captured(classes, classes.scales(**recipe)), classes.trajectories.context
    many = denoiser.trajectory(noise(classes, range(16)), context=context.of(range(16)))
    for images in (1, 4):
        few = denoiser.trajectory(noise(classes, range(images)), context=context.of(range(images)))
        np.testing.assert_array_equal(few, many[:images])


@pytest.fixture
def three_gib():
    """A GPU of which this process may have three GiB: other tests may run beside it."""
    torch.cuda.set_per_process_memory_fraction((3 << 30) / torch.cuda.mem_get_info()[1])
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_that_does_not_fit_is_one_line_with_one_that_does(tmp_path, capsys, three_gib):
    prompts = ["--model", MODEL, "--context", MODEL / "classes.npz", "--guidance", GUIDANCE]
    trajectories, scales, images = tmp_path / "t.safetensors", tmp_path / "s.safetensors", tmp_path / "images"
    assert run("collect", *prompts, "--timesteps", 2, "--num-samples", 2, "--device", "cuda", "--out", trajectories) == 0
    made = run(
        "calibrate", "--model", MODEL, "--trajectories", trajectories, "--preset", "fast", "--device", "cuda", "--out", scales
    )
    assert made == 0
    capsys.readouterr()
    sample = ["sample", "--backend", "native", *prompts, "--scales", scales, "--device", "cuda", "--num-samples", 8192]
    assert run(*sample, "--batch-size", 8192, "--out", images) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    fits = re.search(r"a batch of 8192 does not fit; a batch of (\d+) does: pass --batch-size \1", said)
    assert fits, said
    assert not images.exists() or not any(images.iterdir())
