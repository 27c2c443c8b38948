"""What does not depend on the image: computed once a timestep, or once a prompt, and bound to the passes of a trajectory.

A context has arrays by diffusers' names (see `core.context`): `encoder_hidden_states` [N, S, D] of a prompt, `class_labels`
[N], and SDXL's `text_embeds` [N, D] and `time_ids` [N, 6].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.context import Arrays
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Bound, Params

Context = Mapping[str, Tensor]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
EMBEDDINGS = ("time_embedding.", "class_embedding.", "add_embedding.")


def each_alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x [N, ...], each image by a product of its own: another number of images may sum in another order, and an
    image must not depend on the company it is computed in."""
    return torch.cat([F.linear(one, weight, bias) for one in x.split(1)])


def sinusoids(t: Tensor, channels: int, dtype: torch.dtype, *, freq_shift: int, flip_sin_to_cos: bool) -> Tensor:
    """Embedding [N, channels] of numbers [N] (DDPM, arXiv 2006.11239): sines, then cosines, or the other way round; with
    `freq_shift` 1 the slowest has a period of 10000."""
    half = channels // 2
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000) / (half - freq_shift)))
    angle = t.to(dtype)[:, None] * frequency[None, :]
    parts = [angle.sin(), angle.cos()]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=1)


def embed(network: Network, params: Params, t: Tensor) -> Tensor:
    """The embedding [N, C] of timesteps `t` [N], before what a context adds to it."""
    dtype = params["time_embedding.linear_1.weight"].dtype
    return _two_layers(params, "time_embedding", _waves(network, t, network.config.architecture.base, dtype))


def embeddings(network: Network, params: Params) -> Tensor:
    """`embed` of every timestep of the diffusion process: [T, C]."""
    device = params["time_embedding.linear_1.weight"].device
    with torch.no_grad():
        return embed(network, params, torch.arange(network.config.diffusion.num_diffusion_timesteps, device=device))


def time_table(network: Network, params: Params) -> dict[str, Tensor]:
    """`times` of every timestep of the diffusion process, without a context: block name -> [T, C]."""
    with torch.no_grad():
        return project_times(network, params, embeddings(network, params))


def times(network: Network, params: Params, t: Tensor, context: Context | None = None) -> dict[str, Tensor]:
    """What the timesteps `t` [N], and what a context says of the image as a whole, give each residual block: block name ->
    [N, C] to add, or [N, 2C] to scale and shift by."""
    embedding, added = embed(network, params, t), conditions(network, params, context) if context else None
    if added is None:
        return project_times(network, params, embedding)
    return project_times(network, params, embedding + added, each_alone)


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
        added = _two_layers(params, "add_embedding", torch.cat([text, waved], dim=1), each_alone)
        found = added if found is None else found + added
    return found


def project_times(network: Network, params: Params, embedding: Tensor, linear: Linear = F.linear) -> dict[str, Tensor]:
    """What an embedding [N, C] of the timestep, and of conditions, gives each residual block."""
    h = F.silu(embedding)
    return {
        block: linear(h, params[f"{block}.time_emb_proj.weight"], params[f"{block}.time_emb_proj.bias"])
        for block in network.time_channels
    }


def keys_and_values(network: Network, params: Params, context: Context, linear: Linear = each_alone) -> dict[str, Tensor]:
    """Of every attention to a prompt: name -> [N, 2, C, S]. They depend on the prompt alone."""
    found = {}
    for name in network.prompted:
        prompt = context["encoder_hidden_states"].to(params[f"{name}.to_k.weight"].dtype)
        parts = [linear(prompt, params[f"{name}.{part}.weight"], None) for part in ("to_k", "to_v")]
        found[name] = torch.stack(parts, dim=1).transpose(2, 3)
    return found


@dataclass(frozen=True)
class Held:
    """What a context gives to every pass of a trajectory: keys and values, and what it adds to each image's embedding, if that
    is anything."""

    prompts: dict[str, Tensor]
    added: Tensor | None


class Binder:
    """`bind` for many passes: what depends on the timestep alone comes from one table, what depends on the context is computed
    once for it. It computes in float32 at least, and answers in `dtype`."""

    def __init__(self, network: Network, params: Params, dtype: torch.dtype = torch.float32) -> None:
        # Sines of angles up to a thousand need float32.
        wide = torch.promote_types(dtype, torch.float32)
        self._network, self._dtype = network, dtype
        self._params = {key: params[key].to(wide) for key in bound_parameters(network)}
        self._of_images = of_images(network)
        table = {"": embeddings(network, self._params)} if self._of_images else time_table(network, self._params)
        self._table = {name: rows.to(dtype) for name, rows in table.items()}

    def hold(self, context: Context) -> Held:
        """Of a context's arrays [N, ...], if the network has one."""
        if not context:
            return Held({}, None)
        wide = next(iter(self._params.values())).dtype
        given = {name: value.to(wide) if value.is_floating_point() else value for name, value in context.items()}
        with torch.no_grad():
            prompts = keys_and_values(self._network, self._params, given)
            added = conditions(self._network, self._params, given)
        return Held({name: value.to(self._dtype) for name, value in prompts.items()}, added)

    def __call__(self, t: Tensor | slice, held: Held) -> Bound:
        """Of timesteps [N], or of a slice that is one timestep, for all images."""
        if held.added is None:
            return {name: rows[t] for name, rows in self._table.items()} | held.prompts
        with torch.no_grad():
            embedding = self._table[""][t].to(held.added.dtype) + held.added
            found = project_times(self._network, self._params, embedding, each_alone)
        return {name: value.to(self._dtype) for name, value in found.items()} | held.prompts


def of_images(network: Network) -> bool:
    """Whether a context says something of an image as a whole, so that the timestep's part differs from image to image."""
    a = network.config.architecture
    return a.classes > 0 or a.added_channels > 0


def bound_parameters(network: Network) -> list[str]:
    """The parameters that belong to no layer and no normalization: what is here is computed from them."""
    own = [f"{name}.to_{part}.weight" for name in network.prompted for part in ("k", "v")]
    own += [f"{block}.time_emb_proj.{leaf}" for block in network.time_channels for leaf in ("weight", "bias")]
    return own + [
        name for name in network.parameters if name.startswith(("time_embedding.", "class_embedding.", "add_embedding."))
    ]


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


def _two_layers(params: Params, name: str, x: Tensor, linear: Linear = F.linear) -> Tensor:
    h = F.silu(linear(x, params[f"{name}.linear_1.weight"], params[f"{name}.linear_1.bias"]))
    return linear(h, params[f"{name}.linear_2.weight"], params[f"{name}.linear_2.bias"])
