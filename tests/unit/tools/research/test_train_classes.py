"""A network trained on classes: diffusers reads the folder and answers the same, and its prompts are a context."""

import numpy as np
import pytest
import torch
from small_diffusers import PROMPTED, diffusers

from modiff_trt.core.context import load_context
from modiff_trt.core.errors import InputError
from modiff_trt.networks.binding import bind, on_device
from modiff_trt.networks.diffusers_folder import load_folder, read_folder
from modiff_trt.networks.module import PromptedUNet
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace
from modiff_trt.tools.research.train_classes import TOKENS, train_classes

CLASSES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classes")
    settings = PROMPTED | {"in_channels": 3, "out_channels": 3, "use_linear_projection": True}
    diffusers.UNet2DConditionModel(**settings).save_config(path / "unet")
    diffusers.DDIMScheduler().save_pretrained(path / "scheduler")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    train_classes(path, images, np.arange(12) % CLASSES, minutes=1e-6, seed=0)  # one step
    return path


def test_diffusers_reads_the_folder_and_answers_the_same(folder):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    found = read_folder(folder)
    network = trace(found.config)
    params = load_folder(found, network).params
    context = load_context(folder / "classes.npz", 2.0, found.config.architecture)
    assert len(context.positive["encoder_hidden_states"]) == CLASSES
    given = on_device(context.of(range(CLASSES)), "cpu")
    assert given["encoder_hidden_states"].shape == (2 * CLASSES, TOKENS, PROMPTED["cross_attention_dim"])
    x, t = torch.randn(2 * CLASSES, 3, 8, 8), torch.full((2 * CLASSES,), 7)
    with torch.no_grad():
        expected = theirs(x, 7, given["encoder_hidden_states"]).sample
        ours = run_unet(network, params, x, bound=bind(network, params, t, given))
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5
    # Classes are told apart, and from none.
    assert float((ours[0] - run_unet(network, params, x, bound=bind(network, params, t, _rolled(given)))[0]).abs().max()) > 1e-6


def _rolled(given):
    return {name: value.roll(1, 0) for name, value in given.items()}


def test_nothing_is_left_beside_the_weights(folder):
    assert sorted(file.name for file in (folder / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_images_of_another_size_are_refused(folder):
    with pytest.raises(InputError, match="for images of"):
        train_classes(folder, np.zeros((4, 16, 16, 3), np.uint8), np.zeros(4, np.int64), minutes=1, seed=0)


def test_each_image_is_trained_with_its_own_prompt(folder):
    """As if its prompt were a context, computed the way that sampling computes it."""
    network = PromptedUNet(read_folder(folder).config, prompts=CLASSES + 1, tokens=TOKENS)
    x, t, which = torch.randn(3, 3, 8, 8), torch.tensor([5, 500, 900]), torch.tensor([2, 0, CLASSES])
    unet, params = network.unet.network, dict(network.unet.named_parameters())
    given = {"encoder_hidden_states": network.prompts[which]}
    with torch.no_grad():
        expected = run_unet(unet, params, x, bound=bind(unet, params, t, given))
        torch.testing.assert_close(network(x, t, which), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(network(x, t, which.flip(0)), expected, rtol=1e-5, atol=1e-6)
