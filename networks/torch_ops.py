"""The UNet on torch tensors: the operations, the folded time embedding, and a module for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_trt.core.config import Config
from modiff_trt.networks.unet import GROUPS, NORM_EPS, LayerSpec, Network, trace

Params = Mapping[str, Tensor]
LayerFn = Callable[[LayerSpec, Tensor], Tensor]


def layer_weight(spec: LayerSpec, params: Params) -> Tensor:
    """The float weight [C_out, C_in, K, K] of a layer: for `qkv` the three are stacked."""
    return torch.cat([params[f"{part}.weight"] for part in spec.params])


def layer_bias(spec: LayerSpec, params: Params) -> Tensor:
    """The float bias [C_out] of a layer."""
    return torch.cat([params[f"{part}.bias"] for part in spec.params])


def convolve(spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's convolution, with the padding its specification names."""
    top, left, bottom, right = spec.padding
    if top == bottom and left == right:
        return F.conv2d(x, weight, bias, spec.stride, (top, left))
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, spec.stride)


def float_layer(params: Params) -> LayerFn:
    """The unquantized layer."""

    def run(spec: LayerSpec, x: Tensor) -> Tensor:
        return convolve(spec, x, layer_weight(spec, params), bias=layer_bias(spec, params))

    return run


class TorchOps:
    """The network's operations on tensors [N, C, H, W]; `layer` decides how a convolution is computed."""

    def __init__(self, params: Params, time_bias: Mapping[str, Tensor], layer: LayerFn) -> None:
        self._params = params
        self._time_bias = time_bias
        self._layer = layer

    def layer(self, spec: LayerSpec, x: Tensor) -> Tensor:
        return self._layer(spec, x)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, GROUPS, self._params[f"{name}.weight"], self._params[f"{name}.bias"], NORM_EPS)

    def norm_silu(self, name: str, x: Tensor) -> Tensor:
        return F.silu(self.norm(name, x))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_time(self, block: str, x: Tensor, channels: int) -> Tensor:
        return x + self._time_bias[block][:, :, None, None]

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)

    def attention(self, qkv: Tensor, channels: int) -> Tensor:
        n, _, height, width = qkv.shape
        q, k, v = qkv.reshape(n, 3, channels, height * width).transpose(2, 3).unbind(1)
        if qkv.dtype == torch.float16:
            # Fused attention exists for four axes with the channels of a pixel side by side; anything else runs in float32.
            q, k, v = (t.unsqueeze(1).contiguous() for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5).squeeze(1)
            return mixed.transpose(1, 2).reshape(n, channels, height, width)
        out = F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5)
        return out.transpose(1, 2).reshape(n, channels, height, width)

    def upsample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def avg_pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    def block_done(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return y


def timestep_embedding(t: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal embedding [N, channels] of integer timesteps [N] (DDPM, arXiv 2006.11239)."""
    half = channels // 2
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000) / (half - 1)))
    angle = t.to(dtype)[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def time_bias(network: Network, params: Params, t: Tensor) -> dict[str, Tensor]:
    """What each residual block adds for timesteps `t` [N]: block name -> [N, C]. Depends on `t` alone."""
    first = params["temb.dense.0.weight"]
    h = timestep_embedding(t, network.config.model.ch, first.dtype)
    h = F.linear(h, first, params["temb.dense.0.bias"])
    h = F.linear(F.silu(h), params["temb.dense.1.weight"], params["temb.dense.1.bias"])
    h = F.silu(h)
    return {
        block: F.linear(h, params[f"{block}.temb_proj.weight"], params[f"{block}.temb_proj.bias"])
        for block in network.time_channels
    }


def time_table(network: Network, params: Params) -> dict[str, Tensor]:
    """`time_bias` for every timestep of the diffusion process: block name -> [T, C]."""
    device = params["temb.dense.0.weight"].device
    with torch.no_grad():
        return time_bias(network, params, torch.arange(network.config.diffusion.num_diffusion_timesteps, device=device))


def run_unet(network: Network, params: Params, x: Tensor, bias: Mapping[str, Tensor], layer: LayerFn | None = None) -> Tensor:
    """Epsilon [N, C, H, W] for `x`, given the time biases of its timesteps (`time_bias`, or rows of `time_table`)."""
    return network.function(TorchOps(params, bias, layer or float_layer(params)), x)


class UNet(nn.Module):
    """The same network as a module, with the parameter names of the reference checkpoints; used for training."""

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
        return run_unet(self.network, params, x, bias=time_bias(self.network, params, t))
