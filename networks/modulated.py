"""The modulated layer (MoDiff, ICML 2025, eq. 13-14), as pure functions: state is an argument and a return value.

    q      = clip(rint((x - a_hat) / m / s), -2^(b-1), 2^(b-1)-1)
    a_hat' = a_hat + m s q
    o_hat' = o_hat + m s s_w[c] (W_q * q)
    y      = o_hat'

A trajectory starts from a_hat = 0, o_hat = bias, or from a dithered a_hat (see `dither`). This is the specification that
every backend is tested against; it works in any float dtype, float64 included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modiff_trt.core.dither import dither_offset
from modiff_trt.core.grid import SMALLEST_SCALE, grid_max
from modiff_trt.core.kinds import Granularity, Mode
from modiff_trt.core.moving_grids import shifts as shifts_of_rows
from modiff_trt.core.scales import LayerScales, Scales
from modiff_trt.networks.operations import LayerSpec, Network
from modiff_trt.networks.quantizers import quantize, quantize_weight, unpack_rounding
from modiff_trt.networks.split import divide_skip, fold_skip
from modiff_trt.networks.torch_ops import Bound, Params, convolve, float_layer, layer_bias, layer_weight, run_unet


class LayerState(NamedTuple):
    """`a_hat` [N, *in_shape]: the input as the layer has seen it; `o_hat` [N, *out_shape]: its output."""

    a_hat: Tensor
    o_hat: Tensor


State = dict[str, LayerState]
OnLayer = Callable[["QuantizedLayer", Tensor, LayerState], None]


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with integer weights. `weight` holds integers [C_out, C_in, K, K] in a float dtype.

    `granularity` is `static` (the baked `scale` with its `zero_point`), or a grid found anew at every pass from the largest
    magnitude of each sample (`tensor`, LTQ) or of each input channel of each sample (`channel`, LCQ). A `moving` grid is a
    static one of a layer without state, shifted at each step (`core.moving_grids`).
    """

    spec: LayerSpec
    mode: Mode
    bits: int
    scale: float
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    granularity: Granularity = Granularity.STATIC
    dither: bool = False
    skip_ratio: float = 1.0
    zero_point: int = 0
    moving: bool = False


def shifted_bias(spec: LayerSpec, params: Params, entry: LayerScales) -> Tensor:
    """The bias [C_out] of a layer as its scales have it (see `LayerScales.bias_shift`)."""
    bias = layer_bias(spec, params)
    return bias if entry.bias_shift is None else bias + torch.from_numpy(entry.bias_shift).to(bias)


def quantize_layers(
    network: Network, params: Params, scales: Scales, dtype: torch.dtype = torch.float32
) -> dict[str, QuantizedLayer]:
    """Applies a scales file to float weights: every layer that is not in mode `float`, by name."""
    quantized = (spec for spec in network.layers if scales.layers[spec.name].mode != Mode.FLOAT)
    return {spec.name: quantize_layer(spec, params, scales, dtype) for spec in quantized}


def quantize_layer(spec: LayerSpec, params: Params, scales: Scales, dtype: torch.dtype = torch.float32) -> QuantizedLayer:
    """Applies a scales file to a layer that it does not leave in float."""
    entry = scales.layers[spec.name]
    weight = fold_skip(spec, layer_weight(spec, params), entry.skip_ratio)
    weight_scale = torch.from_numpy(entry.weight_scale).to(weight)
    integers = quantize_weight(weight, weight_scale, entry.weight_bits, round_up=unpack_rounding(entry.round_up, weight))
    return QuantizedLayer(
        spec,
        entry.mode,
        entry.act_bits,
        scale=entry.scale,
        weight=integers.to(dtype),
        weight_scale=weight_scale.to(dtype),
        bias=shifted_bias(spec, params, entry).to(dtype),
        granularity=scales.granularity,
        dither=scales.dither,
        skip_ratio=entry.skip_ratio,
        zero_point=entry.zero_point,
        moving=scales.moving_grids and entry.mode == Mode.INT8,
    )


def initial_a_hat(layer: QuantizedLayer) -> Tensor:
    """a_hat [1, C, H, W] at the start of a trajectory: zero, or with dither the offset."""
    spec = layer.spec
    if not layer.dither:
        return layer.weight.new_zeros(1, *spec.in_shape)
    return torch.from_numpy(dither_offset(spec.name, spec.in_shape, layer.scale, upsampled=spec.upsampled)).to(layer.weight)[
        None
    ]


def initial_state(layer: QuantizedLayer, batch: int) -> LayerState:
    """The start of a trajectory: a_hat = 0, o_hat = bias; with dither, a_hat = offset and o_hat = W offset + bias."""
    a_hat = initial_a_hat(layer)
    o_hat = implied_o_hat(layer, a_hat)
    return LayerState(a_hat.repeat(batch, 1, 1, 1), o_hat.repeat(batch, 1, 1, 1))


def implied_o_hat(layer: QuantizedLayer, a_hat: Tensor, unit: float = 1.0) -> Tensor:
    """The o_hat [N, *out_shape] that belongs to an a_hat of so many units: bias + the layer's product. Every state begins so,
    and is recomputed so."""
    sums = convolve(layer.spec, a_hat, layer.weight)
    return layer.bias[:, None, None] + sums * (unit * layer.weight_scale)[:, None, None]


def integer_product(layer: QuantizedLayer, q: Tensor) -> Tensor:
    """s_w[c] (W_q * q): the layer on a tensor of integers, in units of the activation scale."""
    return convolve(layer.spec, q, layer.weight) * layer.weight_scale[:, None, None]


def modulated_layer(
    layer: QuantizedLayer, x: Tensor, state: LayerState, multiplier: float | Tensor, exact: bool = False
) -> tuple[Tensor, LayerState]:
    """One pass of a modulated layer; returns (y, new state).

    `multiplier` is m, the current row's factor on the baked scale. `exact` leaves the residual unrounded, which is
    the full-precision first step of the paper (and exists only in simulation).
    """
    residual = x - state.a_hat
    if layer.granularity != Granularity.STATIC and not exact:
        change = dynamic_quantize(layer, residual)
        o_hat = state.o_hat + integer_product(layer, change)
        return o_hat, LayerState(state.a_hat + change, o_hat)
    step = multiplier * layer.scale
    if exact:
        q = residual / step
    else:
        q = quantize(residual / multiplier, layer.scale, layer.bits)
    a_hat = state.a_hat + step * q
    o_hat = state.o_hat + step * integer_product(layer, q)
    return o_hat, LayerState(a_hat, o_hat)


def dynamic_quantize(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """x rounded to a symmetric grid spanning its own largest magnitude, per sample or per sample and channel."""
    dims = (1, 2, 3) if layer.granularity == Granularity.TENSOR else (2, 3)
    step = (x.abs().amax(dims, keepdim=True) / grid_max(layer.bits)).clamp_min(SMALLEST_SCALE)
    return step * quantize(x, step, layer.bits)


def bias_of_shifts(layer: QuantizedLayer, shifts: Tensor) -> Tensor:
    """[..., C_out]: what takes a moving grid's `shifts` [..., C_in] out of the layer's output again. They are taken from
    padding too, as if it were quantized like any pixel: its integers are 0, and a bias is the same at all pixels."""
    return -layer.scale * layer.weight_scale * (shifts @ layer.weight.sum((2, 3)).T)


def stateless_layer(layer: QuantizedLayer, x: Tensor, shifts: Tensor | None = None) -> Tensor:
    """Plain quantization of the activation (static: Q-Diffusion, arXiv 2302.04304), of a moving grid with this pass's `shifts`
    [C_in] in steps (subtractive dither, Roberts 1962)."""
    if layer.granularity != Granularity.STATIC:
        return layer.bias[:, None, None] + integer_product(layer, dynamic_quantize(layer, x))
    bias = layer.bias
    if layer.moving:
        if shifts is None:
            raise ValueError(f"layer '{layer.spec.name}' has a moving grid, and no shifts were given")
        q = quantize(x / layer.scale + shifts[:, None, None], 1.0, layer.bits, layer.zero_point)
        bias = bias + bias_of_shifts(layer, shifts)
    else:
        q = quantize(x, layer.scale, layer.bits, layer.zero_point)
    return bias[:, None, None] + layer.scale * integer_product(layer, q)


def moving_shifts(network: Network, scales: Scales) -> Tensor | None:
    """float32 [rows, channels of the widest layer]: for each row what its moving grids are shifted by; None where none move."""
    if not scales.moving_grids:
        return None
    return torch.from_numpy(shifts_of_rows(scales.rows.t, max(spec.in_shape[0] for spec in network.layers)))


def weight_only_layer(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Quantized weights on the exact activation."""
    return layer.bias[:, None, None] + integer_product(layer, x)


def simulate(
    network: Network,
    params: Params,
    layers: Mapping[str, QuantizedLayer],
    state: State,
    x: Tensor,
    bound: Bound,
    multipliers: Mapping[str, float | Tensor],
    *,
    exact: bool = False,
    act_quant: bool | Collection[str] = True,
    shifts: Tensor | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[Tensor, State]:
    """One pass of the quantized network: (eps [N, C, H, W], new state).

    `multipliers` gives m for each modulated layer. With `act_quant` off only the weights are quantized, and the state
    passes through unchanged; names leave it on for those layers alone. `shifts` [channels] are this pass's (a row of
    `moving_shifts`). `on_layer` is shown (layer, x, state) before each modulated layer rounds x - a_hat.
    """
    new_state: State = {}
    unquantized = float_layer(params)

    def run(spec: LayerSpec, value: Tensor) -> Tensor:
        layer = layers.get(spec.name)
        if layer is None:
            return unquantized(spec, value)
        value = divide_skip(spec, value, layer.skip_ratio)
        if not (act_quant if isinstance(act_quant, bool) else spec.name in act_quant):
            return weight_only_layer(layer, value)
        if layer.mode == Mode.INT8:
            return stateless_layer(layer, value, shifts[: spec.in_shape[0]] if shifts is not None else None)
        if on_layer is not None:
            on_layer(layer, value, state[spec.name])
        y, new_state[spec.name] = modulated_layer(
            layer, value, state[spec.name], multiplier=multipliers[spec.name], exact=exact
        )
        return y

    eps = run_unet(network, params, x, bound=bound, layer=run)
    return eps, {**state, **new_state}
