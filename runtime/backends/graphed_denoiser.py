"""What device backends share: x on the device, a row counter, and a CUDA graph that is a whole step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff_trt.core.config import Config
from modiff_trt.core.context import Arrays
from modiff_trt.core.rows import RowTable
from modiff_trt.core.solvers import Updates
from modiff_trt.runtime.denoiser import OnDone

COLUMNS = ("x", "y", "b1", "p", "r", "b0")


def update_columns(updates: Updates, warmup: int) -> Tensor:
    """float32 [rows, 6]: the numbers of each row's update (COLUMNS, see `core.solvers`); a warm-up row leaves x alone."""
    steps = np.stack([getattr(updates, name) for name in COLUMNS], axis=1)
    idle = np.tile([1.0, 0, 0, 0, 0, 0], (warmup, 1))
    return torch.from_numpy(np.concatenate([idle, steps]).astype(np.float32))


class GraphedDenoiser(ABC):
    """A denoiser whose step runs without the host. `table` float32 [rows, W] has one vector for each pass, which a pass
    finds at the start of `self._row`; behind it are the numbers of the row's update. With `guidance` the network sees each
    image twice: without its prompt in the first half of a batch, with it in the second (see `Context`)."""

    def __init__(
        self, config: Config, rows: RowTable, table: Tensor, updates: Updates, device: str, guidance: float | None = None
    ) -> None:
        self._guidance, self._copies = guidance, 1 if guidance is None else 2
        self._config, self._rows, self._updates, self._device = config, rows, updates, torch.device(device)
        self._update_at = table.shape[1]
        self._table = torch.cat([table.to(self._device), update_columns(updates, rows.warmup).to(self._device)], dim=1)
        self._row = torch.empty(self._table.shape[1], device=self._device)
        self._counter = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._x = self._eps = self._before = torch.empty(0)
        self._batch = self._size = self._done = 0
        # By batch size.
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        self._refreshes: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def rows(self) -> RowTable:
        return self._rows

    @property
    def updates(self) -> Updates:
        """The numbers by which it moves x."""
        return self._updates

    @property
    def refresh_every(self) -> int:
        """Passes between two calls of `_refresh`; 0: it is never called."""
        return 0

    @abstractmethod
    def _allocate(self, size: int) -> None:
        """Makes whatever `_predict` needs for a batch of at most `size`."""

    @abstractmethod
    def _begin(self, size: int) -> None:
        """Sets the state of a batch of `size` to the start of a trajectory."""

    @abstractmethod
    def _predict(self, x: Tensor) -> Tensor:
        """Epsilon of x [N, C, H, W] float32 channels_last, for the pass whose vector is `self._row`."""

    def _bind(self, context: Arrays | None, batch: int, size: int) -> bool:
        """Takes the context of `batch` images, to run as `size`; returns whether buffers must be allocated anew for it."""
        return False

    def _refresh(self, size: int) -> None:  # noqa: B027
        """What is due every `refresh_every` passes, for a batch of `size`."""

    def _padded(self, batch: int) -> int:
        """The batch size that runs in place of `batch`."""
        return batch

    @torch.no_grad()
    def reset(self, batch: int, context: Arrays | None = None) -> None:
        """Begins a trajectory. Allocates only if this batch is larger than every one before it, or its context has another
        number of tokens; captures a size that is new."""
        size = self._padded(batch)
        if self._bind(context, batch, size) or size > len(self._x):
            # What fails here must not leave the old buffers behind with a new size.
            self._steps.clear()
            self._refreshes.clear()
            self._x = self._eps = self._before = torch.empty(0)
            self._allocate(self._copies * size)
            shape = (size, *self._config.input_shape)
            self._eps = torch.zeros(shape, device=self._device).contiguous(memory_format=torch.channels_last)
            self._x = torch.zeros_like(self._eps)
            self._before = torch.zeros_like(self._eps) if self._updates.looks_back else self._before
        if self._device.type == "cuda" and size not in self._steps:
            self._capture(size)  # here, because the passes that this takes may then leave anything in the state
        self._batch, self._size, self._done = batch, size, 0
        self._x[:size].zero_()  # padding must not go on from where the last trajectory left it: it would grow without end
        self._before[:size].zero_()
        self._begin(self._copies * size)
        self._counter.zero_()

    def from_host(self, x: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self._device, torch.float32)

    def to_host(self, x: Tensor) -> np.ndarray[Any, Any]:
        return x.float().contiguous().cpu().numpy()

    @torch.no_grad()
    def __call__(self, x: Tensor, row: int) -> Tensor:
        self._x[: len(x)].copy_(x)
        self._counter.fill_(row)
        self._done = row
        self.step()
        return self._eps[: self._batch].clone()

    @torch.no_grad()
    def trajectory(
        self, x_start: np.ndarray[Any, Any], on_done: OnDone | None = None, context: Arrays | None = None
    ) -> np.ndarray[Any, Any]:
        """x_0 from x_T, float32 [N, C, H, W]: the passes of all rows, without host work. On
        CUDA they are queued at once, so that `on_done` hears of them together."""
        self.begin(x_start, context)
        at_once = self._device.type == "cpu"
        for _ in range(len(self.rows)):
            self.step()
            if on_done is not None and at_once:
                on_done(1)
        x = self.to_host(self._x[: self._batch])
        if on_done is not None and not at_once:
            on_done(len(self.rows))
        return x

    @torch.no_grad()
    def begin(self, x_start: np.ndarray[Any, Any], context: Arrays | None = None) -> None:
        """`reset`, with x_T on the device: what `step` goes on from."""
        self.reset(len(x_start), context)
        self._x[: len(x_start)].copy_(self.from_host(x_start))

    @torch.no_grad()
    def step(self) -> None:
        """One pass and the update of x for the row that the counter names; the counter moves on. On CUDA a graph's replay, and
        another's where a refresh is due."""
        self._done += 1
        due = self.refresh_every > 0 and self._done % self.refresh_every == 0 and self._done < len(self.rows)
        self._launch(self._steps, self._pass)
        if due:
            self._launch(self._refreshes, self._refresh_batch)

    def _launch(self, graphs: dict[int, torch.cuda.CUDAGraph], eager: Callable[[int], None]) -> None:
        if self._device.type == "cuda":
            graphs[self._size].replay()
        else:
            eager(self._size)

    def _pass(self, size: int) -> None:
        torch.index_select(self._table, 0, self._counter, out=self._row[None])
        # Here and not at the end: between the row and kernels that load ahead there must be a launch that waits for all before
        # it, and that all after it wait for.
        self._counter.add_(1)
        x, eps = self._x[:size], self._eps[:size]
        if self._guidance is None:
            eps.copy_(self._predict(x))
        else:
            negative, positive = self._predict(torch.cat([x, x])).chunk(2)
            eps.copy_(negative + self._guidance * (positive - negative))
        self._move(x, eps, self._before[:size])

    def _refresh_batch(self, size: int) -> None:
        self._refresh(self._copies * size)

    def _move(self, x: Tensor, eps: Tensor, before: Tensor) -> None:
        """x' in place (see `core.solvers`): one pass over x where x0 is neither clipped nor needed again."""
        ahead, answer, back, p, r, b0 = self._row[self._update_at :]
        clip = self._updates.clip
        if clip is None and not self._updates.looks_back:
            x.mul_(ahead).addcmul_(eps, answer)
            return
        x0 = torch.addcmul(x * p, eps, r)
        x.mul_(ahead).addcmul_(eps, answer)
        if clip is not None:
            clipped = x0.clamp(-clip, clip)
            x.addcmul_(clipped - x0, b0)
            x0 = clipped
        if self._updates.looks_back:
            x.addcmul_(before, back)
            before.copy_(x0)

    def _capture(self, size: int) -> None:
        """Runs the step, and the refresh if there is one, once to compile and tune, and captures them. Leaves state, x and the
        counter as they happen to be."""
        self._counter.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._pass(size)
            if self.refresh_every:
                self._refresh_batch(size)
        torch.cuda.current_stream().wait_stream(stream)
        step = torch.cuda.CUDAGraph()
        with torch.cuda.graph(step):
            self._pass(size)
        if self.refresh_every:
            self._refreshes[size] = torch.cuda.CUDAGraph()
            # They share a memory pool: replays never overlap, and all that outlives a replay lies outside the pool.
            with torch.cuda.graph(self._refreshes[size], pool=step.pool()):
                self._refresh_batch(size)
        self._steps[size] = step
