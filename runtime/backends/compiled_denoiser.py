"""The baseline to beat: the float network in FP16, channels-last, through torch.compile and a CUDA graph."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from modiff_trt.core.rows import plain_rows
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.binding import time_table
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Params, run_unet
from modiff_trt.runtime.backends.graphed_denoiser import GraphedDenoiser
from modiff_trt.runtime.denoiser import StateInfo


class CompiledDenoiser(GraphedDenoiser):
    """FP16 on CUDA. The time biases come from the folded table, as in every backend here."""

    def __init__(
        self, network: Network, params: Params, timesteps: tuple[int, ...], solver: Solver, compiled: bool = True
    ) -> None:
        half = {k: _half(v) for k, v in params.items()}
        offsets, at = {}, 0
        for block, channels in network.time_channels.items():
            offsets[block], at = at, at + channels

        def forward(x: Tensor, row: Tensor) -> Tensor:
            bias = {b: row[None, at : at + network.time_channels[b]].half() for b, at in offsets.items()}
            return run_unet(network, half, x.half(), bound=bias).float()

        self._network = network
        self._times = torch.cat(list(time_table(network, {k: v.cuda() for k, v in params.items()}).values()), dim=1)
        self._forward = torch.compile(forward, dynamic=False) if compiled else forward
        self._follow(timesteps, solver)

    def _follow(self, timesteps: tuple[int, ...], solver: Solver) -> None:
        rows, updates = plain_rows(timesteps), solver.updates(self._network.config.diffusion, timesteps)
        super().__init__(self._network.config, rows, self._times[torch.from_numpy(rows.t)], updates=updates, device="cuda")

    def along(self, timesteps: tuple[int, ...], solver: Solver) -> CompiledDenoiser:
        """The same compiled network on another solver's steps: compiling takes most of a minute."""
        other = copy(self)
        other._follow(timesteps, solver)
        return other

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        return ()

    def _predict(self, x: Tensor) -> Tensor:
        return self._forward(x, self._row)

    def _allocate(self, size: int) -> None:
        """Nothing is kept between passes."""

    def _begin(self, size: int) -> None:
        """Nothing is kept between passes."""


def _half(parameter: Tensor) -> Tensor:
    tensor = parameter.cuda().half()
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
