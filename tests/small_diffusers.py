"""The smallest networks of diffusers that have everything, with random weights."""

import pytest
import torch

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
