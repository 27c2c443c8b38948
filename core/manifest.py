"""What travels inside an exported file, so that it can be sampled from with nothing else. No torch.

JSON under one metadata key: configuration, digests of checkpoint and scales, method and bits per layer, the timestep
sequence, and as base64 float32 the row table [R, L] and the start of every o_hat [C_out].
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import parse_json
from modiff_trt.core.grid import MAX_BITS, MIN_BITS, low_zero_point
from modiff_trt.core.kinds import Granularity, Mode
from modiff_trt.core.solvers import Solver, solver_from_dict

# The modulated layer in the graph: its function, by whose name, domain and version TensorRT finds a plugin, and the attributes
# of its convolution.
FUNCTION, DOMAIN, PLUGIN_VERSION = "ModulatedConv", "modiff", "1"
CONV_ATTRIBUTES = ("kernel_shape", "pads", "strides")

MANIFEST_KEY = "modiff.manifest"
# The manifest in a folder of images.
MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 6
DIGEST = "content_sha256"
# The manifest beside a plan, and the arrays that a trajectory begins from.
PLAN_SCHEMA = 6
START_KIND, START_SCHEMA = "start state", 1


class LayerEntry(TypedDict):
    """A layer in the layer table of a file."""

    mode: Mode
    act_bits: int
    weight_bits: int
    activation_zero_point: NotRequired[int]


class NetworkManifest(TypedDict):
    """What an exported file says of its network. Those in float have only what is required, and a solver."""

    schema: int
    config: dict[str, Any]
    checkpoint_sha256: str
    checkpoint_weights: str
    checkpoint: str
    scales_sha256: str | None
    dtype: str
    method: str
    layers: dict[str, LayerEntry]
    content_sha256: NotRequired[str]
    solver: NotRequired[dict[str, Any]]
    timesteps: NotRequired[list[int]]
    warmup: NotRequired[int]
    modulated: NotRequired[list[str]]
    multipliers: NotRequired[str]
    dither: NotRequired[bool]
    upsampled: NotRequired[list[str]]
    o_hat_start: NotRequired[dict[str, str]]
    granularity: NotRequired[str]


class PlanManifest(TypedDict):
    """What stands beside a plan: what it was built from, by what and for what, and what became of its layers."""

    schema: int
    plan_sha256: str
    onnx_sha256: str
    start_sha256: NotRequired[str]
    runtime: str
    version: str
    target: str
    plugin: bool
    options: dict[str, Any]
    network: NetworkManifest
    report: dict[str, Any]


class Quantization(TypedDict):
    """What a set of images says of the network that made it."""

    method: str
    granularity: str
    weight_bits: int
    act_bits: int
    layers: dict[str, int]


def content_digest(model: Any, manifest: NetworkManifest) -> str:
    """SHA-256 over an ONNX model's graph and functions, and its manifest but for the digest itself, which stands there."""
    digest = hashlib.sha256()
    graph = model.graph
    for tensor in graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)} ".encode())
        digest.update(tensor.raw_data)
    for part in (*graph.node, *graph.input, *graph.output, *model.functions, *model.opset_import):
        digest.update(part.SerializeToString(deterministic=True))
    rest = {key: value for key, value in manifest.items() if key != DIGEST}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def read_manifest(path: Path, model: Any) -> NetworkManifest:
    """The manifest of an ONNX model that was read from `path`. Raises InputError unless this program wrote the file, in this
    version's schema, and it has not been altered since."""
    text = {entry.key: entry.value for entry in model.metadata_props}.get(MANIFEST_KEY)
    if text is None:
        raise InputError(f"ONNX file {path} has no manifest; it was not written by `modiff-trt export`")
    manifest = parse_json(text, f"the manifest of ONNX file {path}")
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise InputError(f"ONNX file {path} has a damaged manifest; export again")
    if manifest["schema"] != MANIFEST_SCHEMA:
        raise InputError(
            f"ONNX file {path} has manifest schema {shown(manifest['schema'])}, not {MANIFEST_SCHEMA}; export again"
        )
    if content_digest(model, cast(NetworkManifest, manifest)) != manifest.get(DIGEST):
        raise InputError(f"ONNX file {path} was altered after it was written; export again")
    check_manifest(manifest, f"ONNX file {path}")
    return cast(NetworkManifest, manifest)


# What a manifest's entries must be; those after the first seven are of quantized networks.
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "checkpoint_sha256": str,
    "checkpoint_weights": str,
    "checkpoint": str,
    "dtype": str,
    "method": str,
    "layers": dict,
    "solver": dict,
    "timesteps": list,
    "warmup": int,
    "modulated": list,
    "multipliers": str,
    "dither": bool,
    "upsampled": list,
    "o_hat_start": dict,
    "granularity": str,
}


def check_manifest(manifest: Mapping[str, Any], source: str) -> None:
    """Raises InputError unless the entries of an exported network's manifest are of the types that its readers expect."""
    quantized = "timesteps" in manifest
    for name, kind in list(ENTRIES.items())[: None if quantized else 7]:
        found = manifest.get(name)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise InputError(f"{source}: '{name}' of its manifest is damaged; export again")
    check_layers(manifest["layers"], f"{source}: its manifest")
    solver_of_manifest(manifest, source)
    if quantized:
        steps, warmup = manifest["timesteps"], manifest["warmup"]
        good = steps and all(type(t) is int and 0 <= t < 2**31 for t in steps) and 0 <= warmup <= 64
        if not good or not all(isinstance(name, str) for name in (*manifest["modulated"], *manifest["upsampled"])):
            raise InputError(f"{source}: the timesteps of its manifest are damaged; export again")


def solver_of_manifest(manifest: Mapping[str, Any], source: str) -> Solver:
    """The solver that an exported network is sampled with. Of one in float it is what the files name that it was exported from,
    or DDIM's own where they were exported by an earlier version. Raises InputError."""
    return solver_from_dict(manifest["solver"], f"{source}: its manifest") if "solver" in manifest else Solver()


def check_layers(layers: Mapping[str, Any], source: str) -> None:
    """Raises InputError unless `layers` is a layer table: mode, bits and zero point by name."""

    def possible(entry: object) -> bool:
        if not isinstance(entry, dict) or entry.get("mode") not in tuple(Mode):
            return False
        bits, zero_point = [entry.get(key) for key in ("act_bits", "weight_bits")], entry.get("activation_zero_point", 0)
        if not all(type(b) is int and MIN_BITS <= b <= MAX_BITS for b in bits):
            return False
        return type(zero_point) is int and zero_point in (0, low_zero_point(entry["act_bits"]))

    for name, entry in layers.items():
        if not possible(entry):
            raise InputError(f"{source} says of layer '{shown(name)[1:-1]}' what no layer can be: {shown(entry)}")


def quantization(method: str, granularity: Granularity, layers: Mapping[str, LayerEntry]) -> Quantization:
    """What a set of images says of the network that made it: method, grids, bits of most layers, and how many have which mode.
    `layers` is a layer table, as files carry it."""
    modes = Counter(entry["mode"] for entry in layers.values())
    bits = Counter((entry["weight_bits"], entry["act_bits"]) for entry in layers.values() if entry["mode"] != Mode.FLOAT)
    weight, act = bits.most_common(1)[0][0] if bits else (32, 32)
    return {
        "method": method,
        "granularity": granularity,
        "weight_bits": weight,
        "act_bits": act,
        "layers": {str(mode): count for mode, count in modes.items()},
    }


def encode_array(array: np.ndarray[Any, Any]) -> str:
    """A float32 array as base64 text."""
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode("ascii")


def decode_array(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The flat float32 array of `encode_array`. Raises ValueError when the text is damaged."""
    return np.frombuffer(base64.b64decode(text, validate=True), np.float32).copy()
