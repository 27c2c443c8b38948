import pytest
import torch
from conftest import ROOT, ddim_state, random_checkpoint, tiny_config
from reference import ReferenceUNet

from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.networks.binding import time_table, times
from modiff_trt.networks.module import UNet
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace


@pytest.mark.parametrize(
    ("size", "ch_mult", "attn"),
    [(12, (1, 3), (6,)), (8, (1,), (8,)), (20, (1, 2, 2), (20, 5)), (16, (2, 1, 1), ())],
    ids=["12px", "8px-one-level", "20px", "16px-no-attention"],
)
def test_equals_independent_reference_in_float64(size, ch_mult, attn):
    config = tiny_config(size, ch_mult, attn)
    network = trace(config)
    params = {k: v.double() for k, v in random_checkpoint(config).params.items()}
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    for t in (0, 7, 999):
        bias = times(network, params, torch.full((3,), t))
        out = run_unet(network, params, x, bias)
        expected = ReferenceUNet(ddim_state(params, len(ch_mult)), 32)(x, t)
        assert (out - expected).norm() / expected.norm() < 1e-12


def test_time_table_is_time_bias_of_every_step():
    config = tiny_config()
    network, params = trace(config), random_checkpoint(config).params
    table = time_table(network, params)
    t = torch.tensor([0, 13, 999])
    for block, bias in times(network, params, t).items():
        torch.testing.assert_close(table[block][t], bias, rtol=1e-5, atol=1e-6)


def test_cifar10_network_is_the_published_one():
    network = trace(load_config(ROOT / "configs/cifar10.yml"))
    assert network.parameter_count == 35_746_307
    assert len(network.parameters) == 328
    assert network.parameters["up_blocks.3.resnets.0.conv_shortcut.weight"] == (128, 384, 1, 1)
    qkv = network.layer("down_blocks.1.attentions.0.to_qkv")
    assert qkv.out_shape == (768, 16, 16)
    assert qkv.params == (
        "down_blocks.1.attentions.0.to_q",
        "down_blocks.1.attentions.0.to_k",
        "down_blocks.1.attentions.0.to_v",
    )
    assert network.layer("up_blocks.0.resnets.0.conv1").split == 256
    assert not any("time_emb" in spec.name for spec in network.layers)


def test_module_has_the_checkpoint_keys_and_the_same_function():
    config = tiny_config()
    module = UNet(config)
    params = dict(module.named_parameters())
    assert set(params) == set(module.network.parameters)
    x, t = torch.randn(2, 3, 12, 12), torch.tensor([3, 500])
    out = module(x, t)
    for i in range(2):
        expected = ReferenceUNet(ddim_state({k: v.detach() for k, v in params.items()}, 2), 32)(x[i : i + 1], int(t[i]))
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-3, atol=1e-4)


def test_without_resampling_convolutions():
    config = tiny_config(resamp_with_conv=False)
    network = trace(config)
    assert not any("sample" in name for name in network.parameters)
    params = random_checkpoint(config).params
    out = run_unet(network, params, torch.randn(1, 3, 12, 12), times(network, params, torch.tensor([5])))
    assert out.shape == (1, 3, 12, 12)


@pytest.mark.parametrize("size", [32, 64, 256])
def test_sizes_users_have(size):
    config = tiny_config(size, (1, 1, 2, 2, 4, 4) if size == 256 else (1, 2, 2, 2), (16,))
    network = trace(config)
    assert network.layers[0].in_shape == network.layers[-1].out_shape == (3, size, size)
    assert any(spec.name.endswith("qkv") and spec.in_shape[1] == 16 for spec in network.layers)
