"""LTQ and LCQ: grids found at run time, per sample, with and without modulation."""

import numpy as np
import pytest
import torch

from modiff_trt.networks.modulated import (
    LayerState,
    dynamic_quantize,
    initial_state,
    modulated_layer,
    quantize_layers,
    stateless_layer,
)
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [3, 8])
def test_grid_spans_each_samples_own_range(tiny, granularity, bits):
    layer = quantize_layers(tiny.network, tiny.checkpoint.params, tiny.scales(granularity=granularity, act_bits=bits))[
        "mid_block.attentions.0.to_qkv"
    ]
    x = torch.randn(3, *layer.spec.in_shape) * torch.tensor([0.01, 1.0, 50.0])[:, None, None, None]
    top = 2 ** (bits - 1) - 1
    q = dynamic_quantize(layer, x).numpy()
    for n in range(3):
        groups = [x[n].numpy()] if granularity == "tensor" else list(x[n].numpy())
        rounded = [q[n]] if granularity == "tensor" else list(q[n])
        for value, found in zip(groups, rounded, strict=True):
            step = np.abs(value).max() / top
            np.testing.assert_allclose(found, np.rint(value / step) * step, rtol=1e-4, atol=1e-6 * step)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_modulated_pass_keeps_o_hat_the_layer_of_a_hat(tiny, granularity):
    layer = quantize_layers(tiny.network, tiny.checkpoint.params, tiny.scales(granularity=granularity, act_bits=4))["conv_in"]
    assert not layer.dither
    x = torch.randn(2, *layer.spec.in_shape)
    y, state = modulated_layer(layer, x, initial_state(layer, 2), 1.0)
    torch.testing.assert_close(stateless_layer(layer, x), y)
    for _ in range(3):
        x = x + 0.1 * torch.randn_like(x)
        before = (x - state.a_hat).abs().amax()
        y, state = modulated_layer(layer, x, LayerState(*state), 1.0)
        assert (x - state.a_hat).abs().max() <= before / 7 / 2 * 1.01
    weight = layer.weight * layer.weight_scale[:, None, None, None]
    torch.testing.assert_close(y, torch.nn.functional.conv2d(state.a_hat, weight, layer.bias, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("method", ["modiff", "qdiff"])
def test_batch_size_never_changes_an_image(tiny, granularity, method):
    denoiser = SimDenoiser(tiny.network, tiny.checkpoint.params, tiny.scales(granularity=granularity, method=method))
    updates, shape = tiny.updates(), tiny.network.config.input_shape
    together = sample_trajectory(denoiser, updates, ImageNoise(5, range(3), shape).draw())
    alone = np.concatenate([sample_trajectory(denoiser, updates, ImageNoise(5, [i], shape).draw()) for i in range(3)])
    assert np.abs(together - alone).max() <= 2e-2 * np.abs(alone).max()
