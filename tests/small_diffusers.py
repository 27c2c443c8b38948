"""The smallest networks of diffusers that have everything, with random weights."""

import numpy as np
import pytest
import torch
from conftest import make_case

from modiff_trt.core.context import PROMPT, Context
from modiff_trt.networks.diffusers_folder import load_folder, read_folder
from modiff_trt.networks.unet2d import trace

diffusers = pytest.importorskip("diffusers")

PIXELS = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
PROMPTED = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}


def random_network(kind, settings):
    """A network by a seed, whose normalizations and biases are random too."""
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**settings).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


TOKENS = 7


def prompted_case(folder):
    """A network with cross-attention, guided on its own trajectories, a prompt for each of two images."""
    random_network("UNet2DConditionModel", PROMPTED).save_pretrained(folder)
    diffusers.DDIMScheduler().save_pretrained(folder)
    found = read_folder(folder)
    network = trace(found.config)
    draw = np.random.default_rng(3).standard_normal
    sides = [{PROMPT: draw((2, TOKENS, PROMPTED["cross_attention_dim"]), np.float32)} for _ in range(2)]
    return make_case(network, load_folder(found, network), 4, 2, 4, context=Context(*sides, 3.0))
