"""The baseline to beat: the float network in FP16, channels-last, through torch.compile and a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff_trt.core.rows import plain_rows
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.torch_ops import Params, run_unet, time_table
from modiff_trt.networks.unet import Network
from modiff_trt.runtime.backends.graphed_denoiser import GraphedDenoiser
from modiff_trt.runtime.denoiser import StateInfo


class CompiledDenoiser(GraphedDenoiser):
    """FP16 on CUDA. The time biases come from the folded table, as in every backend here."""

    def __init__(
        self, network: Network, params: Params, timesteps: tuple[int, ...], solver: Solver, compiled: bool = True
    ) -> None:
        rows, updates = plain_rows(timesteps), solver.updates(network.config.diffusion, timesteps)
        table = time_table(network, {k: v.cuda() for k, v in params.items()})
        biases = torch.cat([values[torch.from_numpy(rows.t)] for values in table.values()], dim=1)
        super().__init__(network.config, rows, biases, updates=updates, device="cuda")
        half = {k: _half(v) for k, v in params.items()}
        offsets, at = {}, 0
        for block, channels in network.time_channels.items():
            offsets[block], at = at, at + channels

        def forward(x: Tensor, row: Tensor) -> Tensor:
            bias = {b: row[None, at : at + network.time_channels[b]].half() for b, at in offsets.items()}
            return run_unet(network, half, x.half(), bias=bias).float()

        self._forward = torch.compile(forward, dynamic=False) if compiled else forward

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
