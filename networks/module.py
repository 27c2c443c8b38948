"""The network as a torch module, for training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_trt.core.config import Config
from modiff_trt.networks.binding import bind, keys_and_values, times
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace


class UNet(nn.Module):
    """The same network as a module, with diffusers' parameter names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.network = trace(config)
        for key, shape in self.network.parameters.items():
            *path, leaf = key.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default initialization for convolutions, linear layers and normalizations."""
        parameters = dict(self.named_parameters())
        for key, p in parameters.items():
            weight = parameters[key.removesuffix("bias") + "weight"] if key.endswith("bias") else p
            with torch.no_grad():
                if weight.ndim == 1:
                    p.fill_(1.0 if key.endswith("weight") else 0.0)
                else:
                    bound = 1 / math.sqrt(weight[0].numel())
                    p.uniform_(-bound, bound)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        params = dict(self.named_parameters())
        return run_unet(self.network, params, x, bound=bind(self.network, params, t))


class PromptedUNet(nn.Module):
    """A network that attends to a prompt, with a table of prompts that is learned with it: [P, S, D]."""

    def __init__(self, config: Config, prompts: int, tokens: int) -> None:
        super().__init__()
        self.unet = UNet(config)
        self.prompts = nn.Parameter(torch.randn(prompts, tokens, config.architecture.cross_channels))

    def forward(self, x: Tensor, t: Tensor, which: Tensor) -> Tensor:
        """The answer to images x [N, C, H, W] at timesteps t [N], given the prompts `which` [N]."""
        network, params = self.unet.network, dict(self.unet.named_parameters())
        table = keys_and_values(network, params, {"encoder_hidden_states": self.prompts}, F.linear)
        bound = times(network, params, t) | {name: kv[which] for name, kv in table.items()}
        return run_unet(network, params, x, bound=bound)
