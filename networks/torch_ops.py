"""The UNet on torch tensors: the operations, the folded time embedding, and a module for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_trt.core.config import Config
from modiff_trt.networks.operations import Block, LayerSpec, Network
from modiff_trt.networks.unet2d import trace

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

    def norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, self._params[f"{name}.weight"], self._params[f"{name}.bias"], eps)

    def norm_silu(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.silu(self.norm(name, x, groups, eps))

    def timed_norm_silu(self, block: str, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        scale, shift = self._time_bias[block][:, :, None, None].chunk(2, dim=1)
        return F.silu(self.norm(name, x, groups, eps) * (1 + scale) + shift)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_time(self, block: str, x: Tensor, channels: int) -> Tensor:
        return x + self._time_bias[block][:, :, None, None]

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)

    def attention(self, qkv: Tensor, channels: int, heads: int) -> Tensor:
        n, _, height, width = qkv.shape
        if heads > 1:
            parts = qkv.reshape(n, 3, heads, channels // heads, height * width).transpose(3, 4)
            q, k, v = (part.contiguous() for part in parts.unbind(1))
            mixed = F.scaled_dot_product_attention(q, k, v)
            return mixed.transpose(2, 3).reshape(n, channels, height, width)
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

    def block(self, name: str, body: Block, x: Tensor) -> Tensor:
        return body(self, x)


def timestep_embedding(t: Tensor, channels: int, dtype: torch.dtype, *, freq_shift: int, flip_sin_to_cos: bool) -> Tensor:
    """Sinusoidal embedding [N, channels] of integer timesteps [N] (DDPM, arXiv 2006.11239): sines, then cosines, or `flip`ped;
    `freq_shift` 1 lets the slowest have a period of 10000."""
    half = channels // 2
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000) / (half - freq_shift)))
    angle = t.to(dtype)[:, None] * frequency[None, :]
    parts = [angle.sin(), angle.cos()]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=1)


def time_bias(network: Network, params: Params, t: Tensor) -> dict[str, Tensor]:
    """What the timesteps `t` [N] give each residual block: block name -> [N, C] to add, or [N, 2C] to scale and shift by.
    Depends on `t` alone."""
    a = network.config.architecture
    first = params["time_embedding.linear_1.weight"]
    h = timestep_embedding(t, a.base, first.dtype, freq_shift=a.freq_shift, flip_sin_to_cos=a.flip_sin_to_cos)
    h = F.linear(h, first, params["time_embedding.linear_1.bias"])
    h = F.linear(F.silu(h), params["time_embedding.linear_2.weight"], params["time_embedding.linear_2.bias"])
    h = F.silu(h)
    return {
        block: F.linear(h, params[f"{block}.time_emb_proj.weight"], params[f"{block}.time_emb_proj.bias"])
        for block in network.time_channels
    }


def time_table(network: Network, params: Params) -> dict[str, Tensor]:
    """`time_bias` for every timestep of the diffusion process: block name -> [T, C]."""
    device = params["time_embedding.linear_1.weight"].device
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
