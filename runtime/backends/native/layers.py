"""What the `native` backend keeps of a calibrated network: integer layers, the row table as numbers, start states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Granularity, Mode
from modiff_trt.core.moving_grids import phases
from modiff_trt.core.scales import LayerScales, Scales, only_simulated
from modiff_trt.core.state_grid import units_a_scale, whole_units
from modiff_trt.networks.binding import embeddings, of_images, time_table
from modiff_trt.networks.modulated import (
    QuantizedLayer,
    bias_of_shifts,
    implied_o_hat,
    initial_a_hat,
    moving_shifts,
    quantize_layer,
)
from modiff_trt.networks.operations import LayerSpec, Network, Role
from modiff_trt.networks.split import skip_factors
from modiff_trt.networks.torch_ops import Params, layer_bias, layer_weight
from modiff_trt.plugins.modulated_conv.geometry import CHANNELS

# Tensor cores read and write channels in groups of 16; our own convolution, which alone knows a step for each image, reads 32.
ALIGN, ALIGN_DYNAMIC = 16, CHANNELS
# Numbers of the row vector that its parts begin at multiples of: 16 bytes.
GRID = 4
# A layer's grid in the row vector: 1/step, unit, multiple, step, phase (see `core.moving_grids`).
GRID_NUMBERS = 5


def aligned(channels: int, to: int = ALIGN) -> int:
    return -(-channels // to) * to


def output_type(spec: LayerSpec, real: torch.dtype) -> torch.dtype:
    """The type of a layer's output. What leaves the network is kept in full: it is small, and the sampler's."""
    return torch.float32 if spec.role is Role.OUTPUT else real


@dataclass(frozen=True)
class NativeLayer:
    """One convolution, with everything that does not change from pass to pass.

    `weight` int8 [K', C', R, R] (K', C' padded to ALIGN) or, in mode `float`, float32 [K, C, R, R]; `bias` float32 [K'];
    `factors` float32 [C] or None (see `networks.split`); `grid_at` and `scale_at` are offsets into the row vector. A `dynamic`
    layer (LTQ) finds each image's step at every pass. `byte_scales` float32 [2, K'] are the scales of the products of the low
    and the high bytes of `a_hat`'s counts: unit weight_scale[k], and 256 times that; None where there is no state.
    `bias` has what a zero point adds to every sum. Of a moving grid `bias_at` is the offset into the row vector of a bias
    [K'] that takes the row's shifts out again, and `bias` is not used.
    """

    spec: LayerSpec
    mode: Mode
    bits: int
    weight: Tensor
    bias: Tensor
    factors: Tensor | None
    unit: float
    grid_at: int
    scale_at: int
    byte_scales: Tensor | None
    dynamic: bool = False
    zero_point: int = 0
    bias_at: int | None = None

    @property
    def moving(self) -> bool:
        return self.bias_at is not None

    @property
    def out_channels(self) -> int:
        return len(self.bias)

    @property
    def frame(self) -> tuple[int, int, int, int]:
        """Pixels around the integers that hold the zero point. Libraries pad with the integer 0, which is another number there;
        where the zero point is 0 they pad."""
        return self.spec.padding if self.zero_point else (0, 0, 0, 0)

    @cached_property
    def product_spec(self) -> LayerSpec:
        """The layer as its product sees it: framed, and without padding, where there is a frame."""
        if not any(self.frame):
            return self.spec
        (channels, height, width), (top, left, bottom, right) = self.spec.in_shape, self.frame
        framed = channels, height + top + bottom, width + left + right
        return replace(self.spec, in_shape=framed, padding=(0, 0, 0, 0))


@dataclass(frozen=True)
class NativeModel:
    """A network ready for the native kernels.

    `table` float32 [rows, W] has one vector for each pass: grids and epilogue scales of all layers, the time biases of all
    blocks (offsets in `time_at`), or the timestep's embedding (at `embedding_at`) where each image adds to it. `start` has
    (state int16 [H*W, C], of an upsampled input at the source's size, and o_hat float32 [P*Q, K']) for each modulated layer.
    """

    network: Network
    scales: Scales
    layers: Mapping[str, NativeLayer]
    norms: Mapping[str, Tensor]
    table: Tensor
    time_at: Mapping[str, int]
    embedding_at: int | None
    start: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PackedLayer:
    """One layer's share of a `NativeModel`: itself, with offsets still to be set; its numbers in the table, [rows, ...] each:
    grid, epilogue scales, and of a moving grid the biases; and its start, if it has state."""

    layer: NativeLayer
    columns: tuple[np.ndarray, ...]
    start: tuple[Tensor, Tensor] | None


class KeptLayers:
    """The packed layers of the first scales that a network was built with, and their tensors on the device. Other scales that
    differ from them in a few layers, as mixtures of modes do, take the rest from here: weights and starts of a large network
    take half a minute to pack, and seconds to move. None of these tensors is ever written to."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[LayerScales, tuple[Any, ...], PackedLayer]] = {}
        # By the tensor that was moved, None before that. `_kept` holds the tensors, so that no other gets the same id.
        self._moved: dict[int, Tensor | None] = {}

    def of(self, scales: Scales, name: str, pack: Callable[[], PackedLayer]) -> PackedLayer:
        """The kept layer of this name where the scales say the same of it, or else what `pack` makes."""
        entry, beside = scales.layers[name], _beside_the_entry(scales, name)
        # New scales share the entries that they do not change. Arrays in them are not compared.
        before = self._kept.get(name)
        if before is not None and before[0] is entry and before[1] == beside:
            return before[2]
        packed = pack()
        if before is None:
            self._kept[name] = entry, beside, packed
            self._moved |= dict.fromkeys(map(id, (packed.layer.weight, *(packed.start or ()))))
        return packed

    def moved(self, source: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """`move(source)`, of a kept layer's tensor the one that the first call made."""
        moved = self._moved.get(id(source))
        if moved is None:
            moved = move(source)
            if id(source) in self._moved:
                self._moved[id(source)] = moved
        return moved


def _beside_the_entry(scales: Scales, name: str) -> tuple[Any, ...]:
    """What else in a scales file a layer depends on: its passes, its steps in them, and what is said of all layers."""
    rows = scales.rows
    steps = rows.multipliers[:, scales.modulated.index(name)].tobytes() if name in scales.modulated else None
    return rows.t.tobytes(), steps, scales.granularity, scales.dither, scales.moving_grids


def _packed(spec: LayerSpec, params: Params, scales: Scales, shifts: Tensor | None) -> PackedLayer:
    """One layer by itself; `shifts` [rows, channels of the widest layer] of moving grids."""
    if scales.layers[spec.name].mode == Mode.FLOAT:
        bias, weight = layer_bias(spec, params).float(), layer_weight(spec, params).float()
        native = NativeLayer(
            spec, Mode.FLOAT, 8, weight=weight, bias=bias, factors=None, unit=0.0, grid_at=0, scale_at=0, byte_scales=None
        )
        return PackedLayer(native, (), None)
    layer, rows = quantize_layer(spec, params, scales), len(scales.rows)
    unit, multiples = _grid(scales, layer)
    dynamic = layer.granularity == Granularity.TENSOR
    step = np.ones(rows) if dynamic else multiples * unit
    grid = np.stack([1 / step, np.full(rows, unit), multiples, step, phases(scales.rows.t)], axis=1)
    padded = np.zeros(aligned(spec.out_shape[0]), np.float64)
    padded[: spec.out_shape[0]] = layer.weight_scale.double().numpy()
    inputs = aligned(spec.in_shape[0], ALIGN_DYNAMIC if dynamic else ALIGN)
    weight = torch.zeros(len(padded), inputs, spec.kernel, spec.kernel, dtype=torch.int8)
    weight[: spec.out_shape[0], : spec.in_shape[0]] = layer.weight.to(torch.int8)
    bias = torch.zeros(len(padded))
    of_zero = layer.zero_point * unit * layer.weight_scale.double() * layer.weight.double().sum((1, 2, 3))
    bias[: spec.out_shape[0]] = (layer.bias.double() - of_zero).float()
    factors = torch.from_numpy(skip_factors(spec, layer.skip_ratio)) if layer.skip_ratio != 1 else None
    columns = [grid, step[:, None] * padded[None]]
    if layer.moving:
        assert shifts is not None
        moved = bias.double().repeat(rows, 1)
        moved[:, : spec.out_shape[0]] += bias_of_shifts(_wide(layer), shifts[:, : spec.in_shape[0]].double())
        columns.append(moved.numpy())
    modulated = layer.mode == Mode.MODIFF
    native = NativeLayer(
        spec,
        layer.mode,
        layer.bits,
        weight=weight,
        bias=bias,
        factors=factors,
        unit=unit,
        grid_at=0,
        scale_at=0,
        byte_scales=torch.from_numpy(np.outer((unit, 256 * unit), padded).astype(np.float32)) if modulated else None,
        dynamic=dynamic,
        zero_point=layer.zero_point,
    )
    return PackedLayer(native, tuple(columns), _start(layer, unit, len(padded)) if modulated else None)


def build(network: Network, params: Params, scales: Scales, kept: KeptLayers | None = None) -> NativeModel:
    """Packs a network on the CPU. `kept` is for several scales of one network and its parameters. Raises InputError for scales
    that cannot run in integers."""
    reason = only_simulated(scales)
    if reason is not None:
        raise InputError(reason)
    kept = KeptLayers() if kept is None else kept
    shifts = moving_shifts(network, scales)
    layers: dict[str, NativeLayer] = {}
    columns: list[np.ndarray] = []
    start: dict[str, tuple[Tensor, Tensor]] = {}
    rows, width = len(scales.rows), 0

    def append(values: np.ndarray) -> int:
        nonlocal width
        at = width
        padding = -values.shape[1] % GRID  # keeps every offset 16-byte aligned
        columns.append(np.pad(values, ((0, 0), (0, padding))).astype(np.float32))
        width += values.shape[1] + padding
        return at

    for spec in network.layers:
        name, packed = spec.name, kept.of(scales, spec.name, partial(_packed, spec, params, scales, shifts))
        layers[name] = packed.layer
        if packed.columns:
            grid_at, scale_at, *bias_at = map(append, packed.columns)
            layers[name] = replace(packed.layer, grid_at=grid_at, scale_at=scale_at, bias_at=bias_at[0] if bias_at else None)
        if packed.start is not None:
            start[name] = packed.start
    at_rows = torch.from_numpy(scales.rows.t)
    each = of_images(network)
    embedding_at = append(embeddings(network, params)[at_rows].double().numpy()) if each else None
    table_of_times = {} if each else time_table(network, params)
    times = {block: append(values[at_rows].double().numpy()) for block, values in table_of_times.items()}
    norms = {key: params[key].float() for name in network.norms for key in (f"{name}.weight", f"{name}.bias")}
    table = torch.from_numpy(np.concatenate([np.zeros((rows, 0), np.float32), *columns], axis=1))
    return NativeModel(network, scales, layers, norms=norms, table=table, time_at=times, start=start, embedding_at=embedding_at)


def _wide(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer in float64."""
    return replace(layer, weight=layer.weight.double(), weight_scale=layer.weight_scale.double())


def _grid(scales: Scales, layer: QuantizedLayer) -> tuple[float, np.ndarray]:
    """(unit, multiples [rows]): a_hat counts units, and a pass's step is a whole number of them (`core.state_grid`)."""
    if layer.mode != Mode.MODIFF:
        return layer.scale, np.ones(len(scales.rows))
    units = units_a_scale(scales, layer.spec.name)
    if units < 1:
        raise InputError(
            f"layer '{layer.spec.name}' has a grid so fine that int16 cannot count up to its activation; calibrate with a "
            "coarser --scale-method, or use torch-sim"
        )
    return layer.scale / units, whole_units(scales.rows.multipliers[:, scales.modulated.index(layer.spec.name)], units)


def _start(layer: QuantizedLayer, unit: float, out_channels: int) -> tuple[Tensor, Tensor]:
    state = (initial_a_hat(layer) / unit).round()
    # Integers in float64 sum exactly, in any order. In float32 the order, and so the start, is another with another number of
    # threads, which torchrun sets.
    wide = {name: getattr(layer, name).double() for name in ("weight", "weight_scale", "bias")}
    o_hat = implied_o_hat(replace(layer, **wide), state.double(), unit)
    padded = torch.zeros(out_channels, o_hat[0, 0].numel())
    padded[: o_hat.shape[1]] = o_hat[0].flatten(1)
    stored = state[0, :, ::2, ::2] if layer.spec.upsampled else state[0]
    return stored.flatten(1).T.contiguous().to(torch.int16), padded.T.contiguous()
