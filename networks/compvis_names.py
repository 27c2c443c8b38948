"""The parameter names of CompVis' latent diffusion and Stable Diffusion checkpoints, for the network's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modiff_trt.core.config import Architecture
from modiff_trt.networks.operations import Network

# Among the weights of text encoder and autoencoder, those of the UNet and of its average begin so.
PREFIX = "diffusion_model."
PREFIXES = (f"model.{PREFIX}", "model_ema.")
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
QKV = ("to_q", "to_k", "to_v")


def compvis_names(network: Network) -> dict[str, str]:
    """The network's parameter -> the same in a CompVis checkpoint, after `with_parts`."""
    places = _places(network.config.architecture)
    return {name: _compvis_name(name, places) for name in network.parameters}


def only_unet(content: Any) -> Any:
    """A checkpoint's content without the parts of a pipeline that are not its UNet, where it has such parts."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(isinstance(key, str) and key.startswith(PREFIXES[0]) for key in state):
        return content
    return {key: value for key, value in state.items() if isinstance(key, str) and key.startswith(PREFIXES)}


def with_parts(state: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """The state with q, k and v of each pixel attention apart. In the file they are one layer, head by head: q, k, v of the
    first, then of the second."""
    found = dict(state)
    a = network.config.architecture
    heads = {f"{place}.": _heads(a, module) for module, place in _places(a).items() if ".attentions." in module}
    for key in state:
        place, _, leaf = key.rpartition("qkv.")
        if place not in heads or leaf not in ("weight", "bias") or heads[place] == 0 or len(state[key]) % (3 * heads[place]):
            continue
        value = found.pop(key)
        by_head = value.reshape(heads[place], 3, len(value) // 3 // heads[place], -1)
        for i, part in enumerate(QKV):
            one = by_head[:, i].reshape(len(value) // 3, -1)
            found[f"{place}{part}.{leaf}"] = one if leaf == "weight" else one.flatten()
    return found


def _places(a: Architecture) -> dict[str, str]:
    """Where the file has each residual block, attention and resampling layer."""
    found, at, last = {}, 1, len(a.channels) - 1
    for level, layers in enumerate(a.layers):
        for i in range(layers):
            found[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{at}.0"
            found[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{at}.1"
            at += 1
        if level != last:
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
            at += 1
    found |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    found["mid_block.attentions.0"] = "middle_block.1"
    at = 0
    for step, layers in enumerate(reversed(a.layers)):
        for i in range(layers + 1):
            found[f"up_blocks.{step}.resnets.{i}"] = f"output_blocks.{at}.0"
            found[f"up_blocks.{step}.attentions.{i}"] = f"output_blocks.{at}.1"
            at += 1
        behind = 2 if a.up_heads[step] else 1
        found[f"up_blocks.{step}.upsamplers.0.conv"] = f"output_blocks.{at - 1}.{behind}.conv"
    return found


def _heads(a: Architecture, module: str) -> int:
    side, _, rest = module.partition(".")
    if side == "mid_block":
        return a.mid_heads
    return (a.down_heads if side == "down_blocks" else a.up_heads)[int(rest.split(".")[0])]


def _compvis_name(name: str, places: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    for length in (3, 4, 5):
        head = ".".join(module.split(".")[:length])
        if head in places:
            inside = module.removeprefix(head).removeprefix(".")
            names = RESNET if ".resnets." in head else ATTENTION
            return ".".join(part for part in (places[head], names.get(inside, inside), leaf) if part)
    return name
