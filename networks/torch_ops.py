"""The network on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.networks.operations import LAYER_NORM_EPS, Block, LayerSpec, Network

Params = Mapping[str, Tensor]
# What a pass is given beside its image, by name: of a block, what the timestep (and a class, or a prompt as a whole) gives it,
# [N, C] to add or [N, 2C] to scale and shift by; of an attention to a prompt, its keys and values [N, 2, C, S]. N may be 1.
Bound = Mapping[str, Tensor]
LayerFn = Callable[[LayerSpec, Tensor], Tensor]


def layer_weight(spec: LayerSpec, params: Params) -> Tensor:
    """The float weight [C_out, C_in, K, K] of a layer: for `qkv` the three are stacked."""
    return torch.cat([params[f"{part}.weight"] for part in spec.params])


def layer_bias(spec: LayerSpec, params: Params) -> Tensor:
    """The float bias [C_out] of a layer: zero where it has none."""
    if not spec.biased:
        return params[f"{spec.params[0]}.weight"].new_zeros(spec.out_shape[0])
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

    def __init__(self, params: Params, bound: Bound, layer: LayerFn) -> None:
        self._params = params
        self._bound = bound
        self._layer = layer

    def layer(self, spec: LayerSpec, x: Tensor) -> Tensor:
        return self._layer(spec, x)

    def norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, self._params[f"{name}.weight"], self._params[f"{name}.bias"], eps)

    def norm_silu(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.silu(self.norm(name, x, groups, eps))

    def timed_norm_silu(self, block: str, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        scale, shift = self._bound[block][:, :, None, None].chunk(2, dim=1)
        return F.silu(self.norm(name, x, groups, eps) * (1 + scale) + shift)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_time(self, block: str, x: Tensor, channels: int) -> Tensor:
        return x + self._bound[block][:, :, None, None]

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

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        gain, shift = self._params[f"{name}.weight"], self._params[f"{name}.bias"]
        return F.layer_norm(x.permute(0, 2, 3, 1), gain.shape, gain, shift, LAYER_NORM_EPS).permute(0, 3, 1, 2)

    def geglu(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * F.gelu(gate)

    def cross_attention(self, name: str, q: Tensor, channels: int, heads: int) -> Tensor:
        n, _, height, width = q.shape
        k, v = self._bound[name].unflatten(2, (heads, channels // heads)).transpose(3, 4).unbind(1)
        # Contiguous, as for attention above: other orders have no fused kernel.
        mixed = F.scaled_dot_product_attention(
            q.reshape(n, heads, channels // heads, height * width).transpose(2, 3).contiguous(),
            k.contiguous().expand(n, -1, -1, -1),
            v.contiguous().expand(n, -1, -1, -1),
        )
        return mixed.transpose(2, 3).reshape(n, channels, height, width)

    def upsample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def avg_pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    def block(self, name: str, body: Block, x: Tensor) -> Tensor:
        return body(self, x)


def run_unet(network: Network, params: Params, x: Tensor, bound: Bound, layer: LayerFn | None = None) -> Tensor:
    """The answer [N, C, H, W] to `x`, given what `networks.binding` computes from its timesteps and its context."""
    return network.function(TorchOps(params, bound, layer or float_layer(params)), x)
