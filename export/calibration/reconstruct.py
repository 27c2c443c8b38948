"""Block reconstruction (BRECQ, arXiv 2102.05426; Q-Diffusion, arXiv 2302.04304) of the UNet's weights with AdaRound.

Blocks are taken in execution order. Each sees the inputs that the already rounded network gives it and is trained to
answer with the full-precision network's output. Residual and attention blocks are reconstructed whole, the remaining
convolutions one by one. Nothing but one block's inputs and outputs is ever held: they are recomputed for each block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modiff_trt.core.context import Arrays
from modiff_trt.export.calibration.adaround import AdaRoundOptions, SoftRounding, learn_rounding
from modiff_trt.networks.binding import Binder, on_device
from modiff_trt.networks.operations import Block, LayerSpec, Network
from modiff_trt.networks.quantizers import quantize_weight
from modiff_trt.networks.split import divide_skip, fold_skip
from modiff_trt.networks.torch_ops import Bound, LayerFn, Params, TorchOps, convolve, float_layer, layer_bias, layer_weight

# What one block's cached inputs and outputs may take, in bytes; beyond it fewer samples are used at a time.
CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Unit:
    """What is reconstructed together: a block, or a single convolution."""

    name: str
    layers: tuple[LayerSpec, ...]
    is_block: bool


@dataclass(frozen=True)
class Samples:
    """Network inputs to reconstruct on: `x` [S, C, H, W], their timesteps `t` [S], and their `lines` [S] of a context."""

    x: Tensor
    t: Tensor
    lines: Tensor
    context: Arrays


@dataclass(frozen=True)
class WeightGrid:
    """Scale [C_out] and bits of one layer's weights, and the ratio that was folded into its skip columns."""

    scale: Tensor
    bits: int
    skip_ratio: float = 1.0


def units(network: Network) -> list[Unit]:
    """All units in execution order; every layer belongs to exactly one."""
    found: list[Unit] = []
    for spec in network.layers:
        if not spec.block:
            found.append(Unit(spec.name, (spec,), False))
        elif found and found[-1].name == spec.block:
            found[-1] = Unit(spec.block, (*found[-1].layers, spec), True)
        else:
            found.append(Unit(spec.block, (spec,), True))
    return found


class _Done(Exception):
    """Ends a forward pass once the wanted unit has been seen."""


class _CaptureOps(TorchOps):
    """The network up to one unit; keeps the unit's input and output."""

    def __init__(self, params: Params, bias: Mapping[str, Tensor], layer: LayerFn, unit: Unit) -> None:
        super().__init__(params, bias, self._watch if not unit.is_block else layer)
        self._plain, self._unit = layer, unit
        self.captured: tuple[Tensor, Tensor] | None = None

    def _watch(self, spec: LayerSpec, x: Tensor) -> Tensor:
        y = self._plain(spec, x)
        if spec.name == self._unit.name:
            self.captured = (x, y)
            raise _Done
        return y

    def block(self, name: str, body: Block, x: Tensor) -> Tensor:
        y = body(self, x)
        if name == self._unit.name:
            self.captured = (x, y)
            raise _Done
        return y


def _capture(
    network: Network, params: Params, x: Tensor, bias: Mapping[str, Tensor], layer: LayerFn, unit: Unit
) -> tuple[Tensor, Tensor]:
    ops = _CaptureOps(params, bias, layer, unit=unit)
    with contextlib.suppress(_Done):
        network.function(ops, x)
    assert ops.captured is not None
    return ops.captured


def _run_unit(network: Network, ops: TorchOps, unit: Unit, x: Tensor) -> Tensor:
    return network.blocks[unit.name](ops, x) if unit.is_block else ops.layer(unit.layers[0], x)


def reconstruct(
    network: Network,
    params: Params,
    grids: Mapping[str, WeightGrid],
    samples: Samples,
    options: AdaRoundOptions,
    seed: int,
    done: Mapping[str, Tensor],
    on_unit: Callable[[Unit, dict[str, Tensor], float], None],
    forward_batch: int = 64,
    progress: Callable[[Iterator[Unit], int], Iterator[Unit]] = lambda units, total: units,
) -> dict[str, Tensor]:
    """AdaRound's decisions for every layer of `grids`: booleans in the weight's shape, by layer name. Others stay in float.

    `done` holds the decisions of units finished earlier, which are taken as they are; `on_unit` receives each new unit's
    decisions and final loss, so that a caller can save them. The result depends on `seed` alone, not on interruptions.
    """
    binder = Binder(network, params)
    rounded: dict[str, Tensor] = {}
    decisions = dict(done)

    def quantized(spec: LayerSpec, x: Tensor) -> Tensor:
        if spec.name not in grids:
            return unquantized(spec, x)
        x = divide_skip(spec, x, grids[spec.name].skip_ratio)
        return convolve(spec, x, rounded.get(spec.name, folded[spec.name]), bias=layer_bias(spec, params))

    folded = {
        s.name: fold_skip(s, layer_weight(s, params), grids[s.name].skip_ratio) for s in network.layers if s.name in grids
    }
    unquantized = float_layer(params)
    todo = units(network)
    for index, unit in enumerate(progress(iter(todo), len(todo))):
        trained = [spec for spec in unit.layers if spec.name in grids]
        if not all(spec.name in decisions for spec in trained):
            soft = {s.name: SoftRounding(folded[s.name], grids[s.name].scale, grids[s.name].bits) for s in trained}
            loss = _train_unit(
                network,
                params,
                binder,
                quantized=quantized,
                unquantized=unquantized,
                grids=grids,
                unit=unit,
                soft=soft,
                samples=samples,
                options=options,
                seed=seed + index,
                forward_batch=forward_batch,
            )
            found = {name: layer.round_up() for name, layer in soft.items()}
            decisions |= found
            on_unit(unit, found, loss)
        for spec in trained:
            grid, up = grids[spec.name], decisions[spec.name]
            integers = quantize_weight(folded[spec.name], grid.scale, grid.bits, round_up=up)
            rounded[spec.name] = integers * grid.scale.reshape(-1, 1, 1, 1)
    return decisions


def _train_unit(
    network: Network,
    params: Params,
    binder: Binder,
    quantized: LayerFn,
    unquantized: LayerFn,
    grids: Mapping[str, WeightGrid],
    unit: Unit,
    soft: Mapping[str, SoftRounding],
    samples: Samples,
    options: AdaRoundOptions,
    seed: int,
    forward_batch: int,
) -> float:
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(params.values())).device
    order = torch.randperm(len(samples.x), generator=generator)
    first, last = unit.layers[0], unit.layers[-1]
    size = 4 * (torch.Size(first.in_shape).numel() + torch.Size(last.out_shape).numel())
    window = order[: max(options.batch_size, CACHE_BYTES // size)]

    def bound(at: Tensor) -> Bound:
        with torch.no_grad():
            lines = {name: value[samples.lines[at].numpy()] for name, value in samples.context.items()}
            return binder(samples.t[at].to(device), binder.hold(on_device(lines, device)))

    inputs, targets = [], []
    with torch.no_grad():
        for part in torch.split(window, forward_batch):
            x = samples.x[part].to(device)
            bias = bound(part)
            inputs.append(_capture(network, params, x, bias=bias, layer=quantized, unit=unit)[0])
            targets.append(_capture(network, params, x, bias=bias, layer=unquantized, unit=unit)[1])
    cached, target = torch.cat(inputs), torch.cat(targets)
    del inputs, targets

    def layer(spec: LayerSpec, x: Tensor) -> Tensor:
        if spec.name not in soft:
            return unquantized(spec, x)
        x = divide_skip(spec, x, grids[spec.name].skip_ratio)
        return convolve(spec, x, soft[spec.name].weight(), bias=layer_bias(spec, params))

    def loss(indices: Tensor) -> Tensor:
        ops = TorchOps(params, bound(window[indices]), layer)
        at = indices.to(device)
        difference = _run_unit(network, ops, unit, cached[at]) - target[at]
        return difference.square().sum(1).mean()

    return learn_rounding(soft, loss, len(window), options=options, generator=generator)
