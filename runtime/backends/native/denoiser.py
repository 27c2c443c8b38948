"""The `native` backend: true INT8 with the state on the device, one CUDA graph a step."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.context import Arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.networks.binding import each_alone, project_times
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Params
from modiff_trt.runtime.backends.bound_context import ADDED, BoundContext
from modiff_trt.runtime.backends.graphed_denoiser import GraphedDenoiser
from modiff_trt.runtime.backends.native.layers import KeptLayers, NativeLayer, NativeModel, build, output_type
from modiff_trt.runtime.backends.native.ops import (
    Buffers,
    Kernels,
    LazyValue,
    NativeOps,
    Source,
    shared_accumulators,
)
from modiff_trt.runtime.backends.native.refresh import REFRESH, refresh
from modiff_trt.runtime.denoiser import OnDone, StateInfo, of_copies


class NativeDenoiser(GraphedDenoiser):
    """A network on native kernels. State lives in buffers that are allocated once for the largest batch seen; a smaller
    batch runs as the next power of two. Sums `o_hat` in float16 are computed anew every REFRESH passes."""

    def __init__(
        self,
        network: Network,
        params: Params,
        scales: Scales,
        kernels: Kernels,
        device: str,
        guidance: float | None = None,
        kept: KeptLayers | None = None,
    ) -> None:
        """`kept` has the layers of denoisers of the same network and parameters with nearly the same scales."""
        kept = KeptLayers() if kept is None else kept
        self._model = _to_device(build(network, params, scales, kept), device, kernels, kept=kept)
        updates = scales.solver.updates(network.config.diffusion, scales.rows.timesteps)
        super().__init__(network.config, scales.rows, self._model.table, updates=updates, device=device, guidance=guidance)
        self._kernels = kernels
        self._shared = shared_accumulators(self._model.layers)
        self._start = self._starts(kept)
        self._buffers = Buffers({}, {}, {}, row=self._row)
        # A token's channels side by side, [N, 2, S, C]: other orders have no fused attention.
        self._context = BoundContext(network, params, self._device, lambda kv: kv.to(kernels.real).transpose(2, 3).contiguous())

    def _bind(self, context: Arrays | None, batch: int, size: int) -> bool:
        return self._context.take(context, copies=self._copies, batch=batch, size=size)

    @property
    def refresh_every(self) -> int:
        # Sums in float32 need none.
        needed = self._start and self._kernels.real != torch.float32 and len(self.rows) > REFRESH
        return REFRESH if needed else 0

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        infos = []
        for name, (state, o_hat) in self._start.items():
            infos.append(StateInfo(f"a_hat.{name}", tuple(state.shape), state.numel() * state.element_size()))
            if name not in self._shared:
                infos.append(StateInfo(f"o_hat.{name}", tuple(o_hat.shape), o_hat.numel() * o_hat.element_size()))
        return of_copies(tuple(infos), self._copies)

    @cached_property
    def _side(self) -> torch.cuda.Stream | None:
        """Where shortcuts run beside the convolutions of their block."""
        return torch.cuda.Stream() if self._device.type == "cuda" else None

    def _padded(self, batch: int) -> int:
        # Each size has its own CUDA graph; without graphs there is nothing to share.
        return 1 << (batch - 1).bit_length() if self._device.type == "cuda" else batch

    def _begin(self, size: int) -> None:
        self._context.begin()
        for name, (state, o_hat) in self._start.items():
            self._buffers.state[name][:size].copy_(state)
            if name not in self._shared:
                self._buffers.o_hat[name][:size].copy_(o_hat)

    def trajectory(
        self, x_start: np.ndarray[Any, Any], on_done: OnDone | None = None, context: Arrays | None = None
    ) -> np.ndarray[Any, Any]:
        x = super().trajectory(x_start, on_done, context)
        self._check_sums()
        return x

    def __call__(self, x: Tensor, row: int) -> Tensor:
        eps = super().__call__(x, row)
        if row == len(self.rows) - 1:
            self._check_sums()
        return eps

    def _check_sums(self) -> None:
        """At a trajectory's end: what overflowed once is in every later sum, but the integers between hide it from images."""
        halves = (self._copies, self._size)
        sums = (t[: self._copies * self._size].unflatten(0, halves)[:, : self._batch] for t in self._buffers.o_hat.values())
        finite = [t.isfinite().all() for t in sums]
        if finite and not torch.stack(finite).all():
            raise InputError(f"a sum o_hat left the range of {self._kernels.real}; use --backend torch-sim, or onnx")

    def _refresh(self, size: int) -> None:
        refresh(self._kernels, self._model, self._buffers.first(size))

    def _predict(self, x: Tensor) -> Tensor:
        times: dict[str, Tensor] = {}
        if self._model.embedding_at is not None:
            # Not with as many threads as happen to be free: the sums are long.
            at, added = self._model.embedding_at, self._buffers.bound[ADDED][: len(x)]
            embedding = self._row[at : at + added.shape[1]] + added
            times = project_times(self._model.network, self._context.params, embedding, each_alone)
        with self._kernels.busy():
            return self._pass_of(x, times)

    def _pass_of(self, x: Tensor, times: dict[str, Tensor]) -> Tensor:
        model, (n, channels, height, width) = self._model, x.shape
        buffers = self._buffers.first(n)
        ops = NativeOps(
            self._kernels, model.layers, model.norms, time_at=model.time_at, buffers=buffers, aside=self._side, times=times
        )
        pixels = x.permute(0, 2, 3, 1).reshape(n, height * width, channels)
        answer = model.network.function(ops, LazyValue(Source(pixels), channels, height, width=width))
        out = answer.main.tensor() if answer.is_plain else ops.written(answer)
        return out[:, :, : answer.channels].reshape(n, height, width, answer.channels).permute(0, 3, 1, 2)

    def _starts(self, kept: KeptLayers) -> dict[str, tuple[Tensor, Tensor]]:
        """State and o_hat to begin from; a shared accumulator begins from the sum of both layers'."""
        start = dict(self._model.start)
        for name, partner in self._shared.items():
            if name in start:
                start[partner] = (start[partner][0], start[partner][1] + start[name][1])

        def state_to_device(state: Tensor, name: str) -> Tensor:
            return self._kernels.start(state, self._model.layers[name].unit).to(self._device)

        def o_hat_to_device(o_hat: Tensor, name: str) -> Tensor:
            return o_hat.to(self._device, output_type(self._model.layers[name].spec, self._kernels.real))

        return {
            name: (
                kept.moved(state, partial(state_to_device, name=name)),
                kept.moved(o_hat, partial(o_hat_to_device, name=name)),
            )
            for name, (state, o_hat) in start.items()
        }

    def _allocate(self, size: int) -> None:
        state = {n: torch.empty(size, *s.shape, dtype=s.dtype, device=self._device) for n, (s, _) in self._start.items()}
        o_hat = {
            n: torch.empty(size, *o.shape, dtype=o.dtype, device=self._device)
            for n, (_, o) in self._start.items()
            if n not in self._shared
        }
        for name, partner in self._shared.items():
            if name in self._start:
                o_hat[name] = o_hat[partner]
        self._context.allocate(size)
        self._buffers = Buffers(state, o_hat, self._filled(size), row=self._row, bound=self._context.buffers)

    def _filled(self, size: int) -> dict[str, Tensor]:
        """The integer inputs of layers whose channels or images are padded. What a pass leaves of them is what they are filled
        with, so that layers share one where that is the same."""
        made: dict[tuple[Any, ...], Tensor] = {}
        filled = {}
        for name, layer in self._model.layers.items():
            channels, height, width = layer.product_spec.in_shape
            held = layer.weight.shape[1]
            if held == channels and not any(layer.frame):
                continue
            real = layer.mode == Mode.FLOAT
            dtype = self._kernels.real if real else self._kernels.integer
            fill = 0 if real else layer.zero_point + self._kernels.offset
            key = (height, width, channels, held, layer.frame, dtype, fill)
            if key not in made:
                made[key] = torch.full((size, height * width, held), fill, dtype=dtype, device=self._device)
            filled[name] = made[key]
        return filled


def _to_device(model: NativeModel, device: str, kernels: Kernels, kept: KeptLayers) -> NativeModel:
    shared = shared_accumulators(model.layers)
    layers, table = {}, model.table.clone()
    for name, layer in model.layers.items():
        bias = layer.bias
        for shortcut, partner in shared.items():
            if partner == name:
                # In a stateless pair the second convolution adds to the first one's output.
                added = model.layers[shortcut]
                bias = bias + added.bias
                if layer.bias_at is not None and added.bias_at is not None:
                    of_added = table[:, added.bias_at : added.bias_at + len(bias)]
                    table[:, layer.bias_at : layer.bias_at + len(bias)] += of_added
        factors = layer.factors.to(device) if layer.factors is not None else None
        weight = kept.moved(layer.weight, partial(_weight_to_device, layer=layer, device=device, kernels=kernels))
        scales = layer.byte_scales.to(device) if layer.byte_scales is not None else None
        layers[name] = replace(layer, weight=weight, bias=bias.to(device), factors=factors, byte_scales=scales)
    norms = {key: value.to(device) for key, value in model.norms.items()}
    return replace(model, layers=layers, norms=norms, table=table)


def _weight_to_device(weight: Tensor, layer: NativeLayer, device: str, kernels: Kernels) -> Tensor:
    if layer.mode == Mode.FLOAT:
        missing = kernels.real_channels(layer.spec) - weight.shape[1]
        weight = F.pad(weight, (0, 0, 0, 0, 0, missing)).to(kernels.real)
    return weight.to(device).contiguous(memory_format=torch.channels_last)
