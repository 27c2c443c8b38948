"""The scales file: what calibration decided, and the only thing that says how each layer is quantized.

A safetensors file with a JSON header (schema version, manifest, modes and bits per layer) and arrays: per layer the
two activation scales and the weight scales, the row table, and the ranges that calibration saw at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modiff_trt.core.config import Config, config_to_dict, model_fingerprint, stored_config
from modiff_trt.core.costs import ModeCurve, curve_from_dict, curve_to_dict
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import Stored, arrays_digest, load_arrays, save_arrays
from modiff_trt.core.kinds import Granularity, Method, Mode, ScaleMethod
from modiff_trt.core.manifest import LayerEntry, check_layers
from modiff_trt.core.rows import RowTable, plain_rows
from modiff_trt.core.solvers import Solver, solver_from_dict

# Files of schema 7 know no zero points, and all of theirs are 0. Grids of files before schema 9 do not move.
KIND, SCHEMA, OLDER = "scales", 9, (7, 8)

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class Layer(Protocol):
    """What a scales file must fit of one layer."""

    @property
    def name(self) -> str: ...
    @property
    def in_shape(self) -> tuple[int, int, int]: ...
    @property
    def out_shape(self) -> tuple[int, int, int]: ...
    @property
    def kernel(self) -> int: ...


class Layered(Protocol):
    """A network, as far as a scales file must fit it."""

    @property
    def config(self) -> Config: ...
    @property
    def layers(self) -> Sequence[Layer]: ...


@dataclass(frozen=True)
class LayerScales:
    """One layer: its mode, bits, the scale of its activation and of its residual, and its weight scales [C_out].

    `round_up` is AdaRound's decision for each weight, as packed bits in the weight's order; None rounds to nearest.
    `skip_ratio` divides the skip channels of a concatenated input (see `split`); 1 leaves them alone. `bias_shift` [C_out] is
    added to the bias, and takes back what rounding the weights adds on average; None adds nothing. `activation_zero_point` is
    of the activation's grid, 0 or below (see `core.grid`); residuals have none.
    """

    mode: Mode
    act_bits: int
    weight_bits: int
    activation_scale: float
    residual_scale: float
    weight_scale: FloatArray
    round_up: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    skip_ratio: float = 1.0
    bias_shift: FloatArray | None = None
    activation_zero_point: int = 0

    @property
    def scale(self) -> float:
        """The baked activation scale of the mode: of the residual for `modiff`, of the activation for `int8`."""
        return self.residual_scale if self.mode == Mode.MODIFF else self.activation_scale

    @property
    def zero_point(self) -> int:
        """The zero point that belongs to `scale`."""
        return 0 if self.mode == Mode.MODIFF else self.activation_zero_point


@dataclass(frozen=True)
class Scales:
    """A scales file.

    `activation_range` and `residual_range` [steps, layers] are the largest magnitudes seen at the DDIM steps
    `range_steps`; `residual_histogram` [layers, bins] has the shares of residuals over 0..`histogram_range` [layers].
    With `moving_grids` layers without state shift their grids at every step (see `core.moving_grids`).
    """

    config: Config
    checkpoint_sha256: str
    method: Method
    scale_method: ScaleMethod
    solver: Solver
    layers: dict[str, LayerScales]
    rows: RowTable
    range_steps: np.ndarray[Any, np.dtype[np.int64]]
    activation_range: FloatArray
    residual_range: FloatArray
    residual_histogram: FloatArray
    histogram_range: FloatArray
    granularity: Granularity = Granularity.STATIC
    dither: bool = False
    moving_grids: bool = False
    # The mixtures of modes that were tried, where modes were chosen by measurement.
    curve: ModeCurve | None = None
    # SHA-256 of the file that they were read from; empty where they were just made.
    file_sha256: str = ""

    @property
    def modulated(self) -> tuple[str, ...]:
        """Names of the layers in mode `modiff`, in execution order: the columns of the row table."""
        return tuple(name for name, layer in self.layers.items() if layer.mode == Mode.MODIFF)

    @property
    def modes(self) -> dict[str, Mode]:
        """Of every layer."""
        return {name: layer.mode for name, layer in self.layers.items()}

    def layer_table(self) -> dict[str, LayerEntry]:
        """Mode, bits and zero point of every layer, as the headers of files carry them."""
        return {
            name: {
                "mode": layer.mode,
                "act_bits": layer.act_bits,
                "weight_bits": layer.weight_bits,
                "activation_zero_point": layer.activation_zero_point,
            }
            for name, layer in self.layers.items()
        }

    def without_modulation(self) -> Scales:
        """The same calibration with every `modiff` layer in mode `int8`, and grids that stand still: plain Q-Diffusion."""
        layers = {k: replace(v, mode=Mode.INT8) if v.mode == Mode.MODIFF else v for k, v in self.layers.items()}
        rows = plain_rows(self.rows.timesteps)
        return replace(self, method=Method.QDIFF, layers=layers, rows=rows, dither=False, moving_grids=False, curve=None)


def only_simulated(scales: Scales) -> str | None:
    """Why integers cannot run these scales, on any backend and in any exported file; None where they can."""
    if scales.rows.exact_start:
        return "the scales file starts with a full-precision step, which integers cannot run; calibrate with --start warmup"
    if scales.granularity == Granularity.CHANNEL:
        return (
            "scales with --granularity channel (LCQ) cannot be exported, nor run in integers: a scale per input channel varies "
            "inside the sum of an INT8 product, where none can apply it; calibrate with --granularity static or tensor, or "
            "sample with --backend torch-sim"
        )
    return None


def save_scales(path: Path, scales: Scales) -> None:
    save_arrays(path, *_content(scales))


def scales_digest(scales: Scales) -> str:
    """SHA-256 of what `save_scales` would write."""
    return arrays_digest(*_content(scales))


def _content(scales: Scales) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    header = {
        "kind": KIND,
        "schema": SCHEMA,
        "config": config_to_dict(scales.config),
        "checkpoint_sha256": scales.checkpoint_sha256,
        "method": scales.method,
        "scale_method": scales.scale_method,
        "granularity": scales.granularity,
        "dither": scales.dither,
        "moving_grids": scales.moving_grids,
        "solver": scales.solver.to_dict(),
        "warmup": scales.rows.warmup,
        "exact_start": scales.rows.exact_start,
        "layers": scales.layer_table(),
        "curve": curve_to_dict(scales.curve),
    }
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "rows.t": scales.rows.t,
        "rows.multipliers": scales.rows.multipliers,
        "range.steps": scales.range_steps,
        "range.activation": scales.activation_range,
        "range.residual": scales.residual_range,
        "histogram.residual": scales.residual_histogram,
        "histogram.range": scales.histogram_range,
    }
    for name, layer in scales.layers.items():
        arrays[f"layer.{name}.weight_scale"] = layer.weight_scale
        if layer.round_up is not None:
            arrays[f"layer.{name}.round_up"] = layer.round_up
        if layer.bias_shift is not None:
            arrays[f"layer.{name}.bias_shift"] = layer.bias_shift
        arrays[f"layer.{name}.scales"] = np.asarray(
            [layer.activation_scale, layer.residual_scale, layer.skip_ratio], np.float32
        )
    return header, arrays


def load_scales(path: Path, network: Layered | None = None, checkpoint_sha256: str | None = None) -> Scales:
    """Reads a scales file and, where given, checks that it belongs to this network and checkpoint."""
    stored = load_arrays(path, KIND, SCHEMA, older=OLDER)
    header, arrays = stored.header, stored.arrays
    try:
        _check_types(stored, path)
        layers = {}
        for name, entry in header["layers"].items():
            activation, residual, ratio = (float(v) for v in arrays[f"layer.{name}.scales"])
            weight_scale = arrays[f"layer.{name}.weight_scale"]
            round_up = arrays.get(f"layer.{name}.round_up")
            layers[name] = LayerScales(
                Mode(entry["mode"]),
                entry["act_bits"],
                entry["weight_bits"],
                activation_scale=activation,
                residual_scale=residual,
                weight_scale=weight_scale,
                round_up=round_up,
                skip_ratio=ratio,
                bias_shift=arrays.get(f"layer.{name}.bias_shift"),
                activation_zero_point=entry.get("activation_zero_point", 0),
            )
        rows = RowTable(arrays["rows.t"], arrays["rows.multipliers"], header["warmup"], exact_start=header["exact_start"])
        scales = Scales(
            stored_config(header["config"], str(path)),
            header["checkpoint_sha256"],
            Method(header["method"]),
            scale_method=ScaleMethod(header["scale_method"]),
            solver=solver_from_dict(header["solver"], f"scales file {path}"),
            layers=layers,
            rows=rows,
            range_steps=arrays["range.steps"],
            activation_range=arrays["range.activation"],
            residual_range=arrays["range.residual"],
            residual_histogram=arrays["histogram.residual"],
            histogram_range=arrays["histogram.range"],
            granularity=Granularity(header["granularity"]),
            dither=header["dither"],
            # Files of earlier versions have neither.
            moving_grids=header.get("moving_grids", False),
            curve=curve_from_dict(header.get("curve"), f"scales file {path}"),
            file_sha256=stored.sha256,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"scales file {path} is incomplete ({type(error).__name__}: {shown(error)}); calibrate again"
        ) from None
    _check(scales, path)
    if network is not None:
        check_network(scales, path, network)
    if checkpoint_sha256 is not None and checkpoint_sha256 != scales.checkpoint_sha256:
        raise InputError(
            f"scales file {path} was calibrated on another checkpoint (SHA-256 {scales.checkpoint_sha256[:12]}..., this one "
            f"is {checkpoint_sha256[:12]}...), or on its other weights (raw, EMA); pass what was used, or calibrate again"
        )
    return scales


def check_network(scales: Scales, path: Path, network: Layered) -> None:
    """Raises InputError unless the scales were made for this network."""
    if model_fingerprint(scales.config) != model_fingerprint(network.config):
        raise InputError(f"{path} was made for another configuration than --config; pass the one it was made with")
    if list(scales.layers) != [spec.name for spec in network.layers]:
        raise InputError(f"{path} has other layers than the network; calibrate again")
    for spec in network.layers:
        layer = scales.layers[spec.name]
        weights = spec.out_shape[0] * spec.in_shape[0] * spec.kernel**2
        if layer.weight_scale.shape != (spec.out_shape[0],):
            raise InputError(f"{path}: layer '{spec.name}' has scales for another number of channels; calibrate again")
        if layer.round_up is not None and layer.round_up.shape != (-(-weights // 8),):
            raise InputError(f"{path}: layer '{spec.name}' has rounding for another number of weights; calibrate again")


# Type and number of dimensions of each array; -1 is any size.
ARRAYS: dict[str, tuple[type, int]] = {
    "rows.t": (np.int64, 1),
    "rows.multipliers": (np.float32, 2),
    "range.steps": (np.int64, 1),
    "range.activation": (np.float32, 2),
    "range.residual": (np.float32, 2),
    "histogram.residual": (np.float32, 2),
    "histogram.range": (np.float32, 1),
}
OF_A_LAYER: dict[str, tuple[type, int]] = {"weight_scale": (np.float32, 1), "scales": (np.float32, 1)}
WORDS: dict[str, Sequence[str]] = {
    "method": tuple(Method),
    "scale_method": tuple(ScaleMethod),
    "granularity": tuple(Granularity),
}


def _check_types(stored: Stored, path: Path) -> None:
    """Raises InputError unless header and arrays are of the types and shapes that a scales file has; KeyError if one is
    absent."""
    header, arrays = stored.header, stored.arrays

    def check(good: bool, what: str) -> None:
        if not good:
            raise InputError(f"scales file {path} has a damaged '{what}'; calibrate again")

    def of(name: str, kind: tuple[type, int]) -> bool:
        return arrays[name].dtype == kind[0] and arrays[name].ndim == kind[1]

    check(isinstance(header["layers"], dict) and bool(header["layers"]), "layers")
    check_layers(header["layers"], f"scales file {path}")
    check(isinstance(header["checkpoint_sha256"], str), "checkpoint_sha256")
    for word, kinds in WORDS.items():
        check(isinstance(header[word], str) and header[word] in kinds, word)
    check(type(header["exact_start"]) is bool and type(header["dither"]) is bool, "start")
    check(type(header.get("moving_grids", False)) is bool, "moving_grids")
    for name, kind in ARRAYS.items():
        check(of(name, kind), name)
    for layer in header["layers"]:
        for part, kind in OF_A_LAYER.items():
            check(of(f"layer.{layer}.{part}", kind), f"layer.{layer}.{part}")
        check(arrays[f"layer.{layer}.scales"].shape == (3,), f"layer.{layer}.scales")
        rounding = arrays.get(f"layer.{layer}.round_up")
        check(rounding is None or (rounding.dtype == np.uint8 and rounding.ndim == 1), f"layer.{layer}.round_up")
        shift = arrays.get(f"layer.{layer}.bias_shift")
        fits = shift is None or (shift.dtype == np.float32 and shift.shape == arrays[f"layer.{layer}.weight_scale"].shape)
        check(fits and (shift is None or bool(np.isfinite(shift).all())), f"layer.{layer}.bias_shift")
    steps, layers = len(arrays["range.steps"]), len(header["layers"])
    for name in ("range.activation", "range.residual"):
        check(arrays[name].shape == (steps, layers), name)
    check(len(arrays["histogram.residual"]) == len(arrays["histogram.range"]) == layers, "histogram.residual")
    warmup, t = header["warmup"], arrays["rows.t"]
    check(type(warmup) is int and 0 <= warmup < len(t) and bool((t[:warmup] == t[warmup]).all()), "warmup")
    inside = (arrays["range.steps"] >= 0) & (arrays["range.steps"] < len(t) - warmup)
    check(bool(inside.all()), "range.steps")


def _check(scales: Scales, path: Path) -> None:
    for name, layer in scales.layers.items():
        numbers = [layer.activation_scale, layer.residual_scale, layer.skip_ratio, *layer.weight_scale]
        positive = (layer.weight_scale > 0).all() and layer.scale > 0 and layer.skip_ratio > 0
        if not np.isfinite(numbers).all() or not positive:
            raise InputError(f"scales file {path}: layer '{name}' has a scale that is not positive; calibrate again")
        if layer.activation_zero_point and scales.granularity != Granularity.STATIC:
            raise InputError(f"scales file {path}: layer '{name}' has a zero point, which no dynamic grid has; calibrate again")
    if scales.moving_grids and scales.granularity != Granularity.STATIC:
        raise InputError(f"scales file {path} has moving grids that are not static, which nothing can run; calibrate again")
    if scales.rows.multipliers.shape != (len(scales.rows), len(scales.modulated)):
        raise InputError(f"scales file {path}: the row table does not fit the modulated layers; calibrate again")
    if not np.isfinite(scales.rows.multipliers).all() or (scales.rows.multipliers <= 0).any():
        raise InputError(f"scales file {path}: the row table has a multiplier that is not positive; calibrate again")
    t, total = scales.rows.t, scales.config.diffusion.num_diffusion_timesteps
    if (t < 0).any() or (t >= total).any() or (np.diff(t) > 0).any():
        raise InputError(f"scales file {path}: the row table has timesteps that the schedule does not have; calibrate again")
    ranges = (scales.activation_range, scales.residual_range, scales.residual_histogram, scales.histogram_range)
    if not all(np.isfinite(part).all() for part in ranges):
        raise InputError(f"scales file {path} has ranges that are not finite; calibrate again")
