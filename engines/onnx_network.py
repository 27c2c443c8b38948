"""An exported file as TensorRT takes it: each modulated layer a plugin, or inlined with its convolution named after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from modiff_trt.core.errors import InputError
from modiff_trt.core.grid import grid_max
from modiff_trt.core.manifest import FUNCTION, NetworkManifest
from modiff_trt.core.onnx_file import read_onnx, without_functions
from modiff_trt.plugins.modulated_conv.geometry import CHANNELS


@dataclass(frozen=True)
class OnnxNetwork:
    """The file as exported, bytes for the parser, the file's manifest and digest, input shapes (-1 is no fixed size), and
    whether its modulated layers are plugins."""

    exported: onnx.ModelProto
    data: bytes
    manifest: NetworkManifest
    sha256: str
    inputs: dict[str, tuple[int, ...]]
    plugin: bool


def load_network(path: Path, plugin: bool = False) -> OnnxNetwork:
    """Reads a file that `modiff-trt export` wrote; `plugin` leaves its modulated layers to the plugin. Raises InputError for
    anything else."""
    file = read_onnx(path)
    if file.weights is not None:
        raise InputError(f"{path} keeps its weights in {file.weights.name}; plans are built from files below 2 GiB, without it")
    model, manifest = file.proto, file.manifest
    if plugin and "row_scale" in [value.name for value in model.graph.input] and not model.functions:
        raise InputError(f"{path} was exported with --inline, which leaves the plugin nothing to take; build with --no-plugin")
    changed = _to_plugins(model, path, manifest) if plugin else without_functions(model)
    _name_convolutions(changed, list(manifest["layers"]))
    inputs = {value.name: tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim) for value in model.graph.input}
    return OnnxNetwork(model, changed.SerializeToString(), manifest, sha256=file.sha256, inputs=inputs, plugin=plugin)


def _name_convolutions(model: onnx.ModelProto, layers: list[str]) -> None:
    """Gives each convolution its layer's name, by which the engine's report knows it."""
    producer = {output: node for node in model.graph.node for output in node.output}
    for layer in layers:
        for output in (f"{layer}.out", f"{layer}.product"):
            if output in producer and producer[output].op_type == "Conv":
                producer[output].name = layer


def _to_plugins(exported: onnx.ModelProto, path: Path, manifest: NetworkManifest) -> onnx.ModelProto:
    """A copy in which each modulated layer is the plugin's node: the grid's ends become attributes, and the weight stands as
    the plugin reads it, [K, R, R, C'] with C' = C padded to CHANNELS."""
    if all(value.name != "row_scale" for value in exported.graph.input):
        raise InputError(
            f"{path} has no modulated layer with a static grid, which is what the plugin computes; build with --no-plugin"
        )
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != FUNCTION:
            continue
        x, a_hat, o_hat, multiplier, _, _, scale, _, weight, weight_scale, _ = node.input
        del node.input[:]
        node.input.extend([x, a_hat, o_hat, multiplier, scale, weight, weight_scale])
        top = grid_max(manifest["layers"][node.name]["act_bits"])
        node.attribute.append(onnx.helper.make_attribute("grid", [-top - 1, top]))
        weights[weight].CopyFrom(numpy_helper.from_array(_packed(numpy_helper.to_array(weights[weight])), weight))
    del model.functions[:]
    return model


def _packed(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """int8 [K, C, R, R] to [K, R, R, C']."""
    padding = -weight.shape[1] % CHANNELS
    return np.ascontiguousarray(np.pad(weight.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, padding))))
