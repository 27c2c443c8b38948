"""Static calibration: activation and residual scales from full-precision trajectories, and the mode of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from modiff_trt.export.checkpoint import Checkpoint
from modiff_trt.export.errors import InputError
from modiff_trt.export.grid import MAX_BITS, MIN_BITS, grid_max
from modiff_trt.export.quantizers import SCALE_METHODS, RangeHistogram, minmax_weight_scale, mse_weight_scale
from modiff_trt.export.rows import RowTable, modulated_rows, plain_rows
from modiff_trt.export.scales import GRANULARITIES, METHODS, LayerScales, Scales
from modiff_trt.export.torch_ops import Params, float_layer, layer_weight, run_unet, time_table
from modiff_trt.export.trajectories import Trajectories
from modiff_trt.export.unet import LayerSpec, Network

EDGE_LAYERS = ("conv_in", "conv_out")


@dataclass(frozen=True)
class Recipe:
    """What to calibrate: `method` modiff or qdiff, bits, how scales are searched, and how a trajectory starts.

    `edge_bits` raises the bits of the first and last convolution (Q-Diffusion keeps them at 8); None leaves them.
    """

    method: str = "modiff"
    weight_bits: int = 8
    act_bits: int = 8
    scale_method: str = "minmax"
    start: str = "warmup"
    edge_bits: int | None = None
    granularity: str = "static"
    dither: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--method must be one of {', '.join(METHODS)}, found '{self.method}'")
        if self.scale_method not in SCALE_METHODS:
            raise InputError(f"--scale-method must be one of {', '.join(SCALE_METHODS)}, found '{self.scale_method}'")
        if self.granularity not in GRANULARITIES:
            raise InputError(f"--granularity must be one of {', '.join(GRANULARITIES)}, found '{self.granularity}'")
        edge = self.edge_bits if self.edge_bits is not None else self.act_bits
        for option, bits in (("--weight-bit", self.weight_bits), ("--act-bit", self.act_bits), ("--edge-bit", edge)):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise InputError(f"{option} must lie between {MIN_BITS} and {MAX_BITS}, found {bits}")

    def bits(self, layer: str) -> tuple[int, int]:
        """(weight bits, activation bits) of a layer."""
        if layer in EDGE_LAYERS and self.edge_bits is not None:
            return max(self.weight_bits, self.edge_bits), max(self.act_bits, self.edge_bits)
        return self.weight_bits, self.act_bits


@dataclass
class LayerRanges:
    """What one layer's input does along the trajectories: over all chosen steps, and per step."""

    activation: RangeHistogram = field(default_factory=RangeHistogram)
    residual: RangeHistogram = field(default_factory=RangeHistogram)
    activation_max: list[float] = field(default_factory=list)
    residual_max: list[float] = field(default_factory=list)


def measure_ranges(
    network: Network,
    params: Params,
    trajectories: Trajectories,
    batch_size: int,
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda steps, total: steps,
) -> dict[str, LayerRanges]:
    """Runs the float network on each chosen step and its predecessor and records every layer's input.

    The residual of step i is a_i - a_{i-1}; step 0 has none (its residual is recorded as 0 and is not part of the
    histogram). Raises InputError when an activation is not finite.
    """
    device = next(iter(params.values())).device
    table = time_table(network, params)
    position = {int(step): i for i, step in enumerate(trajectories.steps)}
    ranges = {spec.name: LayerRanges() for spec in network.layers}
    chosen = [int(step) for step in trajectories.chosen]
    count = trajectories.x.shape[1]

    for step in progress(iter(chosen), len(chosen)):
        peaks = {name: [0.0, 0.0] for name in ranges}
        for begin in range(0, count, batch_size):
            before: dict[str, Tensor] = {}
            for index in [step - 1, step] if step > 0 else [step]:
                x = torch.from_numpy(trajectories.x[position[index], begin : begin + batch_size]).to(device)
                t = trajectories.timesteps[index]
                bias = {block: rows[t].expand(len(x), -1) for block, rows in table.items()}
                recorder = _Recorder(params)
                with torch.no_grad():
                    run_unet(network, params, x, bias, recorder)
                if index == step:
                    for name, value in recorder.inputs.items():
                        if not torch.isfinite(value).all():
                            raise InputError(f"the input of layer '{name}' is not finite at step {step}; check the checkpoint")
                        entry, peak = ranges[name], peaks[name]
                        entry.activation.update(value)
                        peak[0] = max(peak[0], float(value.abs().max()))
                        if name in before:
                            residual = value - before[name]
                            entry.residual.update(residual)
                            peak[1] = max(peak[1], float(residual.abs().max()))
                before = recorder.inputs
        for name, (peak_activation, peak_residual) in peaks.items():
            ranges[name].activation_max.append(peak_activation)
            ranges[name].residual_max.append(peak_residual)
    return ranges


class _Recorder:
    """The float layer, keeping its inputs."""

    def __init__(self, params: Params) -> None:
        self._layer = float_layer(params)
        self.inputs: dict[str, Tensor] = {}

    def __call__(self, spec: LayerSpec, x: Tensor) -> Tensor:
        self.inputs[spec.name] = x
        return self._layer(spec, x)


def make_scales(
    network: Network, checkpoint: Checkpoint, trajectories: Trajectories, ranges: dict[str, LayerRanges], recipe: Recipe
) -> Scales:
    """Turns measured ranges into a scales file's content, by the recipe.

    A layer is modulated only where its residual range is smaller than its activation range.
    """
    layers: dict[str, LayerScales] = {}
    full_range, bits = [], []
    for spec in network.layers:
        measured = ranges[spec.name]
        weight_bits, act_bits = recipe.bits(spec.name)
        weight = layer_weight(spec, checkpoint.params)
        weight_scale = (mse_weight_scale if recipe.scale_method == "mse" else minmax_weight_scale)(weight, weight_bits)
        activation = measured.activation.scale(recipe.scale_method, act_bits)
        residual = measured.residual.scale(recipe.scale_method, act_bits)
        shrinks = 0 < measured.residual.absmax < measured.activation.absmax
        mode = "modiff" if recipe.method == "modiff" and shrinks else "int8"
        layers[spec.name] = LayerScales(mode, act_bits, weight_bits, activation, residual, weight_scale.float().cpu().numpy())
        if mode == "modiff":
            first = max(measured.activation_max[0], float(np.finfo(np.float32).tiny))
            full_range.append(first / grid_max(act_bits) / residual)
            bits.append(act_bits)
    rows: RowTable
    if bits:
        rows = modulated_rows(trajectories.timesteps, np.asarray(full_range), np.asarray(bits), recipe.start)
    else:
        rows = plain_rows(trajectories.timesteps)
    names = [spec.name for spec in network.layers]
    histograms = [ranges[name].residual.coarse() for name in names]
    return Scales(
        network.config,
        checkpoint.sha256,
        recipe.method,
        recipe.scale_method,
        trajectories.skip_type,
        layers,
        rows,
        trajectories.chosen,
        np.asarray([ranges[n].activation_max for n in names], np.float32).T.copy(),
        np.asarray([ranges[n].residual_max for n in names], np.float32).T.copy(),
        np.stack([shares.float().numpy() for shares, _ in histograms]),
        np.asarray([top for _, top in histograms], np.float32),
        recipe.granularity,
        bool(bits) and recipe.start == "warmup" and recipe.granularity == "static" and recipe.dither,
    )
