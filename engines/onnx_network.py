"""An exported file as TensorRT takes it: its functions inlined, and its convolutions named after their layers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import sha256
from modiff_trt.export.manifest import FUNCTION, MANIFEST_KEY, MANIFEST_SCHEMA, graph_digest


@dataclass(frozen=True)
class OnnxNetwork:
    """Bytes for the parser, the file's manifest and digest, and input shapes without the batch; -1 is no fixed size."""

    data: bytes
    manifest: dict[str, Any]
    sha256: str
    inputs: dict[str, tuple[int, ...]]


def load_network(path: Path) -> OnnxNetwork:
    """Reads a file that `modiff-trt export` wrote. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"ONNX file {path} does not exist; write one with `modiff-trt export`")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf raises DecodeError, and others for other damage
        raise InputError(f"ONNX file {path} cannot be read (truncated or altered?): {error}") from None
    found = {entry.key: entry.value for entry in model.metadata_props}
    try:
        manifest = json.loads(found[MANIFEST_KEY])
        schema = manifest["schema"]
    except (KeyError, ValueError, TypeError):
        raise InputError(f"ONNX file {path} has no manifest; it was not written by `modiff-trt export`") from None
    if schema != MANIFEST_SCHEMA:
        raise InputError(f"ONNX file {path} has manifest schema {schema}, not {MANIFEST_SCHEMA}; export again")
    if graph_digest(model.graph) != manifest["graph_sha256"]:
        raise InputError(f"ONNX file {path} was altered after it was written; export again")
    modulated = [node.name for node in model.graph.node if node.op_type == FUNCTION]
    # The parser cannot read a convolution whose attributes are those of a function around it.
    model = onnx.inliner.inline_local_functions(model)
    _name_convolutions(model, modulated, list(manifest["layers"]))
    inputs = {value.name: tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim) for value in model.graph.input}
    return OnnxNetwork(model.SerializeToString(), manifest, sha256(path), inputs)


def _name_convolutions(model: onnx.ModelProto, modulated: list[str], layers: list[str]) -> None:
    """Gives each convolution its layer's name, by which the engine's report knows it."""
    producer = {output: node for node in model.graph.node for output in node.output}
    for layer in layers:
        for output in (f"{layer}.out", f"{layer}.product"):
            if output in producer and producer[output].op_type == "Conv":
                producer[output].name = layer
    for layer in modulated:
        node = producer[f"o_hat_out.{layer}"]
        while node.op_type != "Conv":
            node = producer[next(name for name in node.input if name in producer)]
        node.name = layer
