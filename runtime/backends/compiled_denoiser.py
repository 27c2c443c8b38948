"""The baseline to beat: the float network in FP16, channels-last, through torch.compile and a CUDA graph."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from modiff_trt.core.context import Arrays
from modiff_trt.core.rows import plain_rows
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.binding import bound_parameters, embeddings, of_images, project_times, time_table
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Params, run_unet
from modiff_trt.runtime.backends.bound_context import ADDED, BoundContext
from modiff_trt.runtime.backends.graphed_denoiser import GraphedDenoiser
from modiff_trt.runtime.denoiser import StateInfo


class CompiledDenoiser(GraphedDenoiser):
    """FP16 on CUDA. What the timestep gives comes from the folded table, as in every backend here; keys and values of a context
    are computed once a trajectory."""

    def __init__(
        self,
        network: Network,
        params: Params,
        timesteps: tuple[int, ...],
        solver: Solver,
        compiled: bool = True,
        guidance: float | None = None,
    ) -> None:
        half = {k: _half(v) for k, v in params.items()}
        self._own = {k: params[k].cuda().float() for k in bound_parameters(network)}
        each, self._guided_by = of_images(network), guidance
        offsets, at = {}, 0
        for block, channels in network.time_channels.items():
            offsets[block], at = at, at + channels

        def forward(x: Tensor, row: Tensor, bound: dict[str, Tensor], added: Tensor | None) -> Tensor:
            if added is not None:
                times = project_times(network, half, (row[: added.shape[1]] + added).half())
            else:
                times = {b: row[None, at : at + network.time_channels[b]].half() for b, at in offsets.items()}
            return run_unet(network, half, x.half(), bound=times | bound).float()

        self._network = network
        table = [embeddings(network, self._own)] if each else time_table(network, self._own).values()
        self._times = torch.cat(list(table), dim=1)
        self._forward = torch.compile(forward, dynamic=False) if compiled else forward
        self._follow(timesteps, solver)

    def _follow(self, timesteps: tuple[int, ...], solver: Solver) -> None:
        config, rows = self._network.config, plain_rows(timesteps)
        updates, table = solver.updates(config.diffusion, timesteps), self._times[torch.from_numpy(rows.t)]
        super().__init__(config, rows, table, updates=updates, device="cuda", guidance=self._guided_by)
        self._context = BoundContext(self._network, self._own, self._device, lambda kv: kv.half())

    def along(self, timesteps: tuple[int, ...], solver: Solver) -> CompiledDenoiser:
        """The same compiled network on another solver's steps: compiling takes most of a minute."""
        other = copy(self)
        other._follow(timesteps, solver)
        return other

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        return ()

    def _bind(self, context: Arrays | None, batch: int, size: int) -> bool:
        return self._context.take(context, copies=self._copies, batch=batch, size=size)

    def _predict(self, x: Tensor) -> Tensor:
        bound = {name: t[: len(x)] for name, t in self._context.buffers.items()}
        return self._forward(x, self._row, bound, bound.pop(ADDED, None))

    def _allocate(self, size: int) -> None:
        self._context.allocate(size)

    def _begin(self, size: int) -> None:
        self._context.begin()


def _half(parameter: Tensor) -> Tensor:
    tensor = parameter.cuda().half()
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
