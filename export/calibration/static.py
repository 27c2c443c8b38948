"""Static calibration: activation and residual scales from full-precision trajectories, and the mode of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.grid import MAX_BITS, MIN_BITS, grid_ends, grid_max, low_zero_point
from modiff_trt.core.kinds import Granularity, Method, Mode, Residuals, ScaleMethod, Start, chosen
from modiff_trt.core.rows import RowTable, modulated_rows, plain_rows
from modiff_trt.core.scales import LayerScales, Scales
from modiff_trt.core.state_grid import with_whole_steps
from modiff_trt.export.calibration.ranges import InputRanges, LayerRanges
from modiff_trt.export.calibration.trajectories import Trajectories
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import LayerSpec, Network
from modiff_trt.networks.quantizers import minmax_weight_scale, mse_weight_scale
from modiff_trt.networks.split import fold_skip
from modiff_trt.networks.torch_ops import layer_weight

# How the scale of a weight's channel is found.
WEIGHT_SCALES = {ScaleMethod.MINMAX: minmax_weight_scale, ScaleMethod.MSE: mse_weight_scale}


# Fields of a recipe that are one of a few words.
KINDS: tuple[tuple[str, type[StrEnum], str], ...] = (
    ("method", Method, "--method"),
    ("scale_method", ScaleMethod, "--scale-method"),
    ("activation_method", ScaleMethod, "--activation-method"),
    ("weight_scale_method", ScaleMethod, "--weight-scale-method"),
    ("start", Start, "--start"),
    ("granularity", Granularity, "--granularity"),
    ("residuals", Residuals, "--residuals"),
)


@dataclass(frozen=True)
class Recipe:
    """What to calibrate: `method` modiff or qdiff, bits, how scales are searched, and how a trajectory starts.

    `scale_method` is of residuals, `activation_method` of the activations of layers without state: one static grid holds
    all steps there, and clipping its rare largest values costs less than a coarser step. `weight_scale_method` is of
    weights. `dither` starts a_hat from a random place inside the grid, and moves the grids of layers without state (see
    `core.moving_grids`). `split` gives the skip half of a concatenated input its own grid. `residuals` says whether
    residual ranges are those of the float network or of the quantized one (see `export.calibration.residuals`). `edge_bits`
    raises the bits of the first and last convolution (Q-Diffusion keeps them at 8); None leaves them. Layers below
    `min_intensity` multiply-accumulates for each element of input and output stay in float: there, moving the state takes
    longer than INT8 saves.
    """

    method: Method = Method.MODIFF
    weight_bits: int = 8
    act_bits: int = 8
    scale_method: ScaleMethod = ScaleMethod.MINMAX
    activation_method: ScaleMethod = ScaleMethod.MSE
    weight_scale_method: ScaleMethod = ScaleMethod.MINMAX
    start: Start = Start.WARMUP
    edge_bits: int | None = None
    granularity: Granularity = Granularity.STATIC
    dither: bool = True
    split: bool = False
    residuals: Residuals = Residuals.FLOAT
    percentile: float = 0.9999
    min_intensity: float = 0.0

    def __post_init__(self) -> None:
        for name, kind, option in KINDS:
            object.__setattr__(self, name, chosen(kind, getattr(self, name), option))
        if self.weight_scale_method not in WEIGHT_SCALES:
            raise InputError(
                f"--weight-scale-method must be one of {', '.join(WEIGHT_SCALES)}, found {shown(str(self.weight_scale_method))}"
            )
        if not self.min_intensity >= 0:
            raise InputError(f"--min-intensity must not be negative, found {self.min_intensity}")
        if self.activation_method == ScaleMethod.LEARNED:
            raise InputError("--activation-method must be minmax, mse or percentile; learned scales are of residuals")
        refits = self.residuals == Residuals.QUANTIZED or self.scale_method == ScaleMethod.LEARNED
        if refits and (self.method != Method.MODIFF or self.granularity != Granularity.STATIC):
            raise InputError(
                "--residuals quantized and --scale-method learned are for --method modiff with --granularity static"
            )
        if self.granularity != Granularity.STATIC and self.scale_method != ScaleMethod.MINMAX:
            raise InputError(
                f"--scale-method {self.scale_method} is for --granularity static: other grids span each image's own values"
            )
        if not 0.5 <= self.percentile <= 1:
            raise InputError(f"--percentile must be a share between 0.5 and 1, found {self.percentile}")
        edge = self.edge_bits if self.edge_bits is not None else self.act_bits
        for option, bits in (("--weight-bit", self.weight_bits), ("--act-bit", self.act_bits), ("--edge-bit", edge)):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise InputError(f"{option} must lie between {MIN_BITS} and {MAX_BITS}, found {bits}")

    def bits(self, layer: LayerSpec) -> tuple[int, int]:
        """(weight bits, activation bits) of a layer."""
        if layer.is_edge and self.edge_bits is not None:
            return max(self.weight_bits, self.edge_bits), max(self.act_bits, self.edge_bits)
        return self.weight_bits, self.act_bits


class _Grid(NamedTuple):
    """A layer's grid steps, the largest magnitude of its input at the first timestep, its lowest input at all of them, its skip
    ratio, and the activation's zero point."""

    activation: float
    residual: float
    first_max: float
    lowest: float
    skip_ratio: float
    zero_point: int


def _grid(ranges: LayerRanges, mode: Mode, recipe: Recipe, bits: int) -> _Grid:
    """The grids of a layer by its ranges. The activation's zero point is the low one where no value is below its grid: the
    step is finer then by nearly a half, and plain INT8 as much nearer to full precision (docs/lab/modes.md)."""
    low = low_zero_point(bits)
    grid = _grid_from(low, ranges, mode, recipe=recipe, bits=bits)
    fits = recipe.granularity == Granularity.STATIC and grid.lowest >= grid_ends(bits, low)[0] * grid.activation
    return grid if fits else _grid_from(0, ranges, mode, recipe=recipe, bits=bits)


def _grid_from(zero_point: int, ranges: LayerRanges, mode: Mode, *, recipe: Recipe, bits: int) -> _Grid:
    """The grids with this zero point, in units of the main half where the recipe splits the input."""

    def steps(part: InputRanges) -> tuple[float, float]:
        share = recipe.percentile
        activation = part.activation.scale(recipe.activation_method, bits, share, zero_point)
        return activation, part.residual.scale(recipe.scale_method, bits, share)

    if not recipe.split or ranges.halves is None:
        return _Grid(*steps(ranges), ranges.activation_max[0], ranges.activation_min, skip_ratio=1.0, zero_point=zero_point)
    (main, main_residual), (skip, skip_residual) = (steps(part) for part in ranges.halves)
    ratio = skip_residual / main_residual if mode == Mode.MODIFF else skip / main
    # In float32, as the file holds it: the weights are folded with it here and when they are quantized.
    ratio = float(np.float32(ratio))
    first = max(ranges.halves[0].activation_max[0], ranges.halves[1].activation_max[0] / ratio)
    lowest = min(ranges.halves[0].activation_min, ranges.halves[1].activation_min / ratio)
    return _Grid(
        max(main, skip / ratio),
        max(main_residual, skip_residual / ratio),
        first,
        lowest=lowest,
        skip_ratio=ratio,
        zero_point=zero_point,
    )


def check_recipe(network: Network, recipe: Recipe, steps: int) -> None:
    """Raises InputError where a recipe cannot be for this network and number of steps, before anything is computed."""
    if recipe.method == Method.MODIFF and steps == 1:
        raise InputError(
            "one step has no change from a step before it, so nothing to modulate; use --method qdiff, or more --timesteps"
        )
    most = max(spec.intensity for spec in network.layers)
    if most < recipe.min_intensity:
        raise InputError(
            f"no layer does --min-intensity {recipe.min_intensity:g} multiply-accumulates an element (the most is {most:.0f}), "
            "so that nothing would be quantized; pass --min-intensity 0"
        )


def make_scales(
    network: Network, checkpoint: Checkpoint, trajectories: Trajectories, ranges: dict[str, LayerRanges], recipe: Recipe
) -> Scales:
    """Turns measured ranges into a scales file's content, by the recipe.

    A layer is modulated only where its residual range is smaller than its activation range, and quantized only where it
    has the recipe's intensity.
    """
    check_recipe(network, recipe, len(trajectories.timesteps))
    if recipe.method == Method.MODIFF and not any(step > 0 for step in trajectories.chosen):
        raise InputError("the trajectories hold no step after the first, so no residuals; collect with more --calib-steps")
    layers: dict[str, LayerScales] = {}
    full_range, bits = [], []
    for spec in network.layers:
        measured = ranges[spec.name]
        weight_bits, act_bits = recipe.bits(spec)
        shrinks = 0 < measured.residual.absmax < measured.activation.absmax
        mode = Mode.MODIFF if recipe.method == Method.MODIFF and shrinks else Mode.INT8
        if spec.intensity < recipe.min_intensity:
            mode = Mode.FLOAT
        grid = _grid(measured, mode, recipe, bits=act_bits)
        weight = fold_skip(spec, layer_weight(spec, checkpoint.params), grid.skip_ratio)
        weight_scale = WEIGHT_SCALES[recipe.weight_scale_method](weight, weight_bits)
        layers[spec.name] = LayerScales(
            mode,
            act_bits,
            weight_bits,
            activation_scale=grid.activation,
            residual_scale=grid.residual,
            weight_scale=weight_scale.float().cpu().numpy(),
            skip_ratio=grid.skip_ratio,
            activation_zero_point=grid.zero_point,
        )
        if mode == Mode.MODIFF:
            first = max(grid.first_max, float(np.finfo(np.float32).tiny))
            full_range.append(first / grid_max(act_bits) / grid.residual)
            bits.append(act_bits)
    rows: RowTable
    if bits:
        rows = modulated_rows(trajectories.timesteps, np.asarray(full_range), np.asarray(bits), start=recipe.start)
    else:
        rows = plain_rows(trajectories.timesteps)
    names = [spec.name for spec in network.layers]
    histograms = [ranges[name].residual.coarse() for name in names]
    scales = Scales(
        network.config,
        checkpoint.sha256,
        recipe.method,
        scale_method=recipe.scale_method if recipe.method == Method.MODIFF else recipe.activation_method,
        solver=trajectories.solver,
        layers=layers,
        rows=rows,
        range_steps=trajectories.chosen,
        activation_range=np.asarray([ranges[n].activation_max for n in names], np.float32).T.copy(),
        residual_range=np.asarray([ranges[n].residual_max for n in names], np.float32).T.copy(),
        residual_histogram=np.stack([shares.float().numpy() for shares, _ in histograms]),
        histogram_range=np.asarray([top for _, top in histograms], np.float32),
        granularity=recipe.granularity,
        dither=bool(bits) and recipe.start == Start.WARMUP and recipe.granularity == Granularity.STATIC and recipe.dither,
        # Q-Diffusion's grids stand still.
        moving_grids=recipe.method == Method.MODIFF and recipe.granularity == Granularity.STATIC and recipe.dither,
    )
    return with_whole_steps(scales)
