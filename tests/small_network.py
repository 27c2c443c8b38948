"""The smallest network that has everything: Triton's interpreter takes a second for every ten launches."""

import torch
from conftest import Case, make_case, tiny_config

from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Role, convolution, traced
from modiff_trt.networks.unet2d import pixel_attention, resnet

SIZE = 4
A = tiny_config(SIZE, (1,), ()).architecture


def small_function(ops, x):
    """A UNet of two levels: strided and upsampled convolutions, attention, shortcuts, and a concatenated skip."""
    full, half = (SIZE, SIZE), (SIZE // 2, SIZE // 2)
    h = first = ops.layer(convolution("conv_in", (3, *full), 32, 3, role=Role.INPUT), x)
    h = ops.layer(convolution("down_blocks.0.downsamplers.0.conv", (32, *full), 32, 3, stride=2), h)
    h = resnet(ops, A, "mid_block.resnets.0", h, (32, *half), 64)
    h = pixel_attention(ops, A, "mid_block.attentions.0", h, (64, *half), 1)
    h = ops.layer(convolution("up_blocks.0.upsamplers.0.conv", (64, *full), 64, 3, upsampled=True), ops.upsample(h))
    h = resnet(ops, A, "up_blocks.1.resnets.0", ops.concat(h, first), (96, *full), 32, split=64)
    h = ops.norm_silu("conv_norm_out", h, A.groups, A.eps)
    return ops.layer(convolution("conv_out", (32, *full), 3, 3, role=Role.OUTPUT, normalized=True), h)


def random_params(network, seed=0):
    """Weights by a seed, of a size that keeps values near one."""
    generator = torch.Generator().manual_seed(seed)
    gains = {f"{norm}.weight" for norm in network.norms}
    params = {}
    for name, shape in network.parameters.items():
        noise = torch.randn(shape, generator=generator)
        params[name] = noise / torch.Size(shape[1:]).numel() ** 0.5 if len(shape) > 1 else (name in gains) + 0.2 * noise
    return params


def small_case(steps=2) -> Case:
    network = traced(tiny_config(SIZE, (1,), ()), small_function)
    return make_case(network, Checkpoint(random_params(network), "random-0", ""), steps, 2, steps)
