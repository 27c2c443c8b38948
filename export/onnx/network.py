"""Writes the QDQ ONNX file: the network, its constants, its state inputs and outputs, and its manifest.

Inputs: `x` [N,C,H,W] float32, `t` [N] int64, a context's arrays by diffusers' names (see `core.context`), `row_scale` [L]
float32, then `a_hat.<layer>` and `o_hat.<layer>`.
Outputs: `eps` float32, then `a_hat_out.<layer>` and `o_hat_out.<layer>`. N is dynamic. State and everything between
layers is float32 or float16 (`dtype`); group statistics, softmax and the time table are float32 in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from modiff_trt.core.config import config_to_dict
from modiff_trt.core.context import context_arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.core.kinds import UNQUANTIZED, Granularity, Mode
from modiff_trt.core.manifest import (
    DOMAIN,
    MANIFEST_KEY,
    MANIFEST_SCHEMA,
    NetworkManifest,
    content_digest,
    encode_array,
)
from modiff_trt.core.onnx_file import DATA, without_functions, write_outside
from modiff_trt.core.scales import LayerScales, Scales, only_simulated
from modiff_trt.core.solvers import Solver
from modiff_trt.export.onnx.function import IR_VERSION, OPSET, modulated_conv_function
from modiff_trt.export.onnx.ops import LayerConstants, OnnxOps, Value
from modiff_trt.export.onnx.times import bind_conditions, bind_lines, bind_moving_grids, bind_times, only_known_times
from modiff_trt.networks.binding import embeddings, of_images, time_table
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.modulated import quantize_layers
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import layer_bias, layer_weight

DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}
# Tensors of one file: protobuf takes 2 GiB, with the graph.
LARGEST_FILE = 2**31 - 2**26
# By which a scale may change when it is written in the file's float type: twice what float16 rounds normal numbers by.
MOST_ROUNDING = 2**-10


def build_onnx(
    network: Network,
    checkpoint: Checkpoint,
    scales: Scales | None,
    dtype: str,
    scales_sha256: str | None,
    inline: bool = False,
    solver: Solver | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a network: quantized by `scales`, or in float throughout when it is None. With `inline` the modulated
    layers stand in the graph node by node, which TensorRT's parser reads without our plugin, and not as local functions.
    `solver` is what a float network's own files name, and what its file is sampled with; scales have theirs.

    Raises InputError for an unknown dtype, a scales file that cannot be exported, or a scale too small for float16.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, found '{dtype}'")
    reason = only_simulated(scales) if scales is not None else None
    if reason is not None:
        raise InputError(reason)
    dynamic = scales is not None and scales.granularity == Granularity.TENSOR
    real = DTYPES[dtype]
    modulated = scales.modulated if scales is not None else ()
    constants = _constants(network, checkpoint, scales)
    _check_range(constants, real)
    params = {key: value.numpy() for key, value in checkpoint.params.items()}
    ops = OnnxOps(network, constants, params, modulated=modulated, dtype=real, dynamic=dynamic)
    context = context_arrays(network.config.architecture)
    if network.prompted:
        ops.bind_prompt()
    timesteps = [int(t) for t in scales.rows.t] if scales is not None else None
    lines = bind_lines(ops, timesteps, network.config.diffusion.num_diffusion_timesteps)
    if of_images(network):
        bind_conditions(ops, network, params, table=embeddings(network, checkpoint.params).numpy(), lines=lines)
    else:
        table = time_table(network, checkpoint.params)
        bind_times(ops, network, {block: rows.numpy() for block, rows in table.items()}, lines)
    if scales is not None:
        bind_moving_grids(ops, network, scales, lines)
    if modulated and not dynamic:
        ops.bind_rows("row_scale")
    x = ops.cast("x", "x_cast", ops._type)
    eps = network.function(ops, Value(x, network.config.input_shape))
    wide = ops.cast(eps.name, "eps_wide", TensorProto.FLOAT) if dtype == "fp16" else eps.name
    if timesteps is None:
        ops.node("Identity", [wide], "eps")
    else:
        only_known_times(ops, wide, "eps", timesteps=timesteps, steps=network.config.diffusion.num_diffusion_timesteps)

    info = helper.make_tensor_value_info
    image = ["N", *network.config.input_shape]
    inputs = [info("x", TensorProto.FLOAT, image), info("t", TensorProto.INT64, ["N"])]
    for name, array in context.items():
        inputs.append(info(name, TensorProto.INT64 if array.integer else TensorProto.FLOAT, ["N", *array.shape]))
    outputs = [info("eps", TensorProto.FLOAT, image)]
    if modulated and not dynamic:
        inputs.append(info("row_scale", TensorProto.FLOAT, [len(modulated)]))
    for name in modulated:
        spec = network.layer(name)
        for state, shape in (("a_hat", spec.in_shape), ("o_hat", spec.out_shape)):
            inputs.append(info(f"{state}.{name}", ops._type, ["N", *shape]))
            outputs.append(info(f"{state}_out.{name}", ops._type, ["N", *shape]))
    graph = helper.make_graph(ops.nodes, "modiff_unet", inputs, outputs, list(ops.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [modulated_conv_function()] if modulated else []
    model = helper.make_model(
        graph, opset_imports=opsets, functions=functions, ir_version=IR_VERSION, producer_name="modiff-trt"
    )
    if inline:
        model = without_functions(model)
    manifest = _manifest(network, checkpoint, scales, dtype=dtype, scales_sha256=scales_sha256, constants=constants)
    if scales is None and solver is not None:
        manifest["solver"] = solver.to_dict()
    manifest["content_sha256"] = content_digest(model, manifest)
    helper.set_model_props(model, {MANIFEST_KEY: json.dumps(manifest)})
    return model


def save_onnx(path: Path, model: onnx.ModelProto, *, outside: bool = False) -> int:
    """Checks the model (onnx.checker with shape inference), writes it, and returns the bytes written. `outside`, and where one
    file would be too large, its tensors go to `<path>.data`, and the model is left without them."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if outside or size > LARGEST_FILE:
        write_outside(path, model)
        return path.stat().st_size + path.with_name(path.name + DATA).stat().st_size
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return path.stat().st_size


def _constants(network: Network, checkpoint: Checkpoint, scales: Scales | None) -> dict[str, LayerConstants]:
    quantized = quantize_layers(network, checkpoint.params, scales) if scales is not None else {}
    constants = {}
    for spec in network.layers:
        if scales is None or spec.name not in quantized:
            weight = layer_weight(spec, checkpoint.params).numpy()
            none = LayerScales(
                Mode.FLOAT, 8, 8, activation_scale=1.0, residual_scale=1.0, weight_scale=np.ones(spec.out_shape[0], np.float32)
            )
            constants[spec.name] = LayerConstants(weight, layer_bias(spec, checkpoint.params).numpy(), none)
        else:
            layer = quantized[spec.name]
            constants[spec.name] = LayerConstants(layer.weight.numpy(), layer.bias.numpy(), scales.layers[spec.name])
    return constants


def _check_range(constants: dict[str, LayerConstants], real: Any) -> None:
    """Below float16's smallest normal number its steps are even, so that a scale there loses figures: some are allowed."""
    for name, layer in constants.items():
        if layer.scales.mode == Mode.FLOAT:
            continue
        values = np.append(layer.scales.weight_scale, layer.scales.scale).astype(np.float64)
        worst = np.abs(values.astype(real).astype(np.float64) / values - 1).argmax()
        if abs(float(real(values[worst])) / values[worst] - 1) > MOST_ROUNDING:
            raise InputError(
                f"layer '{name}' has the scale {values[worst]:.1e}, which this float type does not hold to "
                f"{MOST_ROUNDING:.1%}; export with --dtype fp32"
            )


def _manifest(
    network: Network,
    checkpoint: Checkpoint,
    scales: Scales | None,
    dtype: str,
    scales_sha256: str | None,
    constants: dict[str, LayerConstants],
) -> NetworkManifest:
    manifest: NetworkManifest = {
        "schema": MANIFEST_SCHEMA,
        "config": config_to_dict(network.config),
        "checkpoint_sha256": checkpoint.sha256,
        "checkpoint_weights": checkpoint.weights,
        "checkpoint": checkpoint.description,
        "scales_sha256": scales_sha256,
        "dtype": dtype,
        "method": scales.method if scales is not None else UNQUANTIZED,
        "layers": {},
    }
    if scales is not None:
        manifest |= {
            "solver": scales.solver.to_dict(),
            "timesteps": list(scales.rows.timesteps),
            "warmup": scales.rows.warmup,
            "modulated": list(scales.modulated),
            "multipliers": encode_array(scales.rows.multipliers),
            "dither": scales.dither,
            "upsampled": [spec.name for spec in network.layers if spec.upsampled],
            "o_hat_start": {name: encode_array(constants[name].bias) for name in scales.modulated},
            "granularity": scales.granularity,
            "layers": scales.layer_table(),
        }
    return manifest
