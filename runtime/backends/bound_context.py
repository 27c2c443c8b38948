"""What a context gives to every pass of a trajectory, in buffers that a captured graph reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modiff_trt.core.context import Arrays, checked, context_arrays
from modiff_trt.networks.binding import bound_parameters, conditions, keys_and_values, on_device
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Params

# Among what is bound: what a context adds to the embedding of the timestep [N, C].
ADDED = "added"


class BoundContext:
    """Keys and values by attention, and what is `ADDED` to the embedding of each image, if that is anything."""

    def __init__(self, network: Network, params: Params, device: torch.device, store: Callable[[Tensor], Tensor]) -> None:
        """`store` brings keys and values [N, 2, C, S] float32 into the type and order in which passes read them."""
        self._network, self._device, self._store = network, device, store
        self._is_needed = bool(context_arrays(network.config.architecture))
        kept = bound_parameters(network) if self._is_needed else []
        self.params = {key: params[key].to(device).float() for key in kept}
        self._given: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def take(self, context: Arrays | None, *, copies: int, batch: int, size: int) -> bool:
        """Takes `copies` of `batch` images' lines, to run as `copies` of `size`: padding images are given what the last one is.
        Returns whether the buffers must be allocated anew, because another number of tokens is given."""
        if not self._is_needed:
            return False
        given = on_device(checked(context), self._device)
        bound = {name: self._store(kv) for name, kv in keys_and_values(self._network, self.params, given).items()}
        added = conditions(self._network, self.params, given)
        if added is not None:
            bound[ADDED] = added
        before = {name: t.shape[1:] for name, t in self._given.items()}
        self._given = {name: _padded(t.unflatten(0, (copies, batch)), size) for name, t in bound.items()}
        return before != {name: t.shape[1:] for name, t in self._given.items()}

    def allocate(self, size: int) -> None:
        """Makes the buffers for a batch of at most `size`."""
        self.buffers = {
            name: torch.zeros(size, *t.shape[1:], dtype=t.dtype, device=self._device) for name, t in self._given.items()
        }

    def begin(self) -> None:
        """Puts what was taken last into the buffers."""
        for name, value in self._given.items():
            self.buffers[name][: len(value)].copy_(value)


def _padded(halves: Tensor, size: int) -> Tensor:
    """[copies, batch, ...] as [copies * size, ...]."""
    copies, batch, *rest = halves.shape
    padding = halves[:, -1:].expand(copies, size - batch, *rest)
    return torch.cat([halves, padding], dim=1).flatten(0, 1)
