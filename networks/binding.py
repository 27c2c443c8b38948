"""What does not depend on the image: computed once a timestep, or once a prompt, and bound to the passes of a trajectory.

A context has arrays by diffusers' names (see `core.context`): `encoder_hidden_states` [N, S, D] of a prompt, `class_labels`
[N], and SDXL's `text_embeds` [N, D] and `time_ids` [N, 6].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.context import Arrays
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Bound, Params

Context = Mapping[str, Tensor]


def sinusoids(t: Tensor, channels: int, dtype: torch.dtype, *, freq_shift: int, flip_sin_to_cos: bool) -> Tensor:
    """Embedding [N, channels] of numbers [N] (DDPM, arXiv 2006.11239): sines, then cosines, or the other way round; with
    `freq_shift` 1 the slowest has a period of 10000."""
    half = channels // 2
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000) / (half - freq_shift)))
    angle = t.to(dtype)[:, None] * frequency[None, :]
    parts = [angle.sin(), angle.cos()]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=1)


def embeddings(network: Network, params: Params) -> Tensor:
    """The embedding [T, C] of every timestep, before what a context adds to it."""
    a = network.config.architecture
    first = params["time_embedding.linear_1.weight"]
    t = torch.arange(network.config.diffusion.num_diffusion_timesteps, device=first.device)
    with torch.no_grad():
        return _two_layers(params, "time_embedding", _waves(network, t, a.base, first.dtype))


def times(network: Network, params: Params, t: Tensor, context: Context | None = None) -> dict[str, Tensor]:
    """What the timesteps `t` [N], and what a context says of the image as a whole, give each residual block: block name ->
    [N, C] to add, or [N, 2C] to scale and shift by."""
    dtype = params["time_embedding.linear_1.weight"].dtype
    waves = _waves(network, t, network.config.architecture.base, dtype)
    embedding = _two_layers(params, "time_embedding", waves)
    added = conditions(network, params, context) if context else None
    return project_times(network, params, embedding if added is None else embedding + added)


def time_table(network: Network, params: Params) -> dict[str, Tensor]:
    """`times` of every timestep of the diffusion process, without a context: block name -> [T, C]."""
    device = params["time_embedding.linear_1.weight"].device
    with torch.no_grad():
        return times(network, params, torch.arange(network.config.diffusion.num_diffusion_timesteps, device=device))


def conditions(network: Network, params: Params, context: Context) -> Tensor | None:
    """What a context says of each image as a whole, [N, C], to be added to the timestep's embedding; None where it says nothing
    of that kind."""
    a = network.config.architecture
    found = None
    if a.classes:
        found = params["class_embedding.weight"][context["class_labels"]]
    if a.added_channels:
        ids, text = context["time_ids"], context["text_embeds"]
        waved = _waves(network, ids.flatten(), a.added_times, text.dtype).reshape(len(ids), -1)
        added = _two_layers(params, "add_embedding", torch.cat([text, waved], dim=1))
        found = added if found is None else found + added
    return found


def project_times(network: Network, params: Params, embedding: Tensor) -> dict[str, Tensor]:
    """What an embedding [N, C] of the timestep, and of conditions, gives each residual block."""
    h = F.silu(embedding)
    return {
        block: F.linear(h, params[f"{block}.time_emb_proj.weight"], params[f"{block}.time_emb_proj.bias"])
        for block in network.time_channels
    }


def keys_and_values(network: Network, params: Params, context: Context) -> dict[str, Tensor]:
    """Of every attention to a prompt: name -> [N, 2, C, S]. They depend on the prompt alone."""
    found = {}
    for name in network.prompted:
        prompt = context["encoder_hidden_states"].to(params[f"{name}.to_k.weight"].dtype)
        parts = [F.linear(prompt, params[f"{name}.{part}.weight"]) for part in ("to_k", "to_v")]
        found[name] = torch.stack(parts, dim=1).transpose(2, 3)
    return found


class Binder:
    """`bind` for many batches: where the timestep's part does not depend on the image it comes from one table."""

    def __init__(self, network: Network, params: Params) -> None:
        a = network.config.architecture
        self._network, self._params = network, params
        self._table = None if a.classes or a.added_channels else time_table(network, params)

    def __call__(self, t: Tensor, context: Context) -> Bound:
        """Of timesteps [N], with a context's arrays [N, ...], if the network has one."""
        if self._table is None:
            return bind(self._network, self._params, t, context)
        found = {block: rows[t] for block, rows in self._table.items()}
        return found | (keys_and_values(self._network, self._params, context) if context else {})


def bind(network: Network, params: Params, t: Tensor, context: Context | None = None) -> Bound:
    """All that passes at the timesteps `t` [N] are given beside their images."""
    prompts = keys_and_values(network, params, context) if context else {}
    return times(network, params, t, context) | prompts


def on_device(arrays: Arrays, device: str | torch.device) -> dict[str, Tensor]:
    """A context's arrays as tensors."""
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}


def _waves(network: Network, t: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    a = network.config.architecture
    return sinusoids(t, channels, dtype, freq_shift=a.freq_shift, flip_sin_to_cos=a.flip_sin_to_cos)


def _two_layers(params: Params, name: str, x: Tensor) -> Tensor:
    h = F.silu(F.linear(x, params[f"{name}.linear_1.weight"], params[f"{name}.linear_1.bias"]))
    return F.linear(h, params[f"{name}.linear_2.weight"], params[f"{name}.linear_2.bias"])
