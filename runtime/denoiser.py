"""What the sampler asks of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from modiff_trt.core.context import Arrays
from modiff_trt.core.rows import RowTable
from modiff_trt.core.solvers import Updates

OnDone = Callable[[int], None]
Array = Any  # a numpy array or a torch tensor: whatever the backend computes on


@dataclass(frozen=True)
class StateInfo:
    """One state array of a backend: its name, its shape for one image, and its bytes for one image."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


def of_copies(infos: tuple[StateInfo, ...], copies: int) -> tuple[StateInfo, ...]:
    """The state of one image that is made, where the network sees it in so many copies, each with a state of its own."""
    if copies == 1:
        return infos
    return tuple(replace(info, shape=(copies, *info.shape), nbytes=copies * info.nbytes) for info in infos)


@runtime_checkable
class WholeTrajectory(Protocol):
    """A backend that can run all rows of a trajectory without the host in between, by the updates that it was made with."""

    @property
    def updates(self) -> Updates: ...

    def trajectory(
        self, x_start: np.ndarray[Any, Any], on_done: OnDone | None = None, context: Arrays | None = None
    ) -> np.ndarray[Any, Any]:
        """x_0 from x_T, both float32 [N, C, H, W]. `on_done` is called with the number of passes that have ended since it was
        called last; `context` is that of `Denoiser.reset`."""


class Denoiser(Protocol):
    """One backend holding one network. State lives between `reset` and the last row, inside the backend."""

    @property
    def rows(self) -> RowTable:
        """The passes of one trajectory."""

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        """The arrays kept between passes; empty for stateless networks."""

    def reset(self, batch: int, context: Arrays | None = None) -> None:
        """Begins a trajectory for `batch` images, conditioned on a context's arrays [batch, ...], which networks need that have
        one (see `core.context`): the only place where state is created."""

    def from_host(self, x: np.ndarray[Any, Any]) -> Array:
        """Takes float32 [N, C, H, W] to the backend."""

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        """Brings a result back as float32 numpy."""

    def __call__(self, x: Array, row: int) -> Array:
        """The network's answer to x at row `row` of `rows`. Rows of a trajectory must be run in order."""
