"""Changes of a simulated network's state between passes, for the studies: see `SimDenoiser`'s `between_passes`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from modiff_trt.networks.modulated import LayerState, QuantizedLayer, State, implied_o_hat, integer_product
from modiff_trt.runtime.backends.torch_denoiser import BetweenPasses


def offset_between(width: float, every: bool = False) -> BetweenPasses:
    """Adds a seeded uniform offset of +-`width` grid steps to a_hat, and its image under the layer to o_hat: after the first
    pass only, or with `every` before each later pass too."""

    def change(row: int, layers: Mapping[str, QuantizedLayer], state: State) -> State:
        if row > 1 and not every:
            return state
        generator = torch.Generator(next(iter(state.values())).a_hat.device).manual_seed(row)
        return {name: _moved(layers[name], part, width, generator=generator) for name, part in state.items()}

    return change


def _moved(layer: QuantizedLayer, state: LayerState, width: float, generator: torch.Generator) -> LayerState:
    uniform = torch.rand(state.a_hat.shape, generator=generator, device=generator.device) * 2 - 1
    offset = uniform * width * layer.scale
    return LayerState(state.a_hat + offset, state.o_hat + integer_product(layer, offset))


def rounded_between(a_hat: torch.dtype, o_hat: torch.dtype, refresh: int = 0) -> BetweenPasses:
    """Keeps the state between passes in narrower types, and every `refresh` passes recomputes o_hat from a_hat."""

    def change(row: int, layers: Mapping[str, QuantizedLayer], state: State) -> State:
        changed = {}
        for name, part in state.items():
            counts, sums = part.a_hat.to(a_hat).to(part.a_hat.dtype), part.o_hat
            if refresh and row % refresh == 0:
                sums = implied_o_hat(layers[name], counts)
            changed[name] = LayerState(counts, sums.to(o_hat).to(sums.dtype))
        return changed

    return change
