"""An exported ONNX file as it lies on disk, read once: its bytes, graph, manifest and digest. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner

from modiff_trt.core.errors import InputError, one_line
from modiff_trt.core.files import atomic_path, digest_of, read_file
from modiff_trt.core.manifest import FUNCTION, NetworkManifest, read_manifest

# Of the file with a large network's tensors: the end of its name, the bytes from which on a tensor is put there, and at which
# multiples they begin, so that readers may map them.
DATA, LEAST_OUTSIDE, ALIGNED = ".data", 1024, 4096


@dataclass(frozen=True)
class Weights:
    """The file beside that holds a large network's tensors: its name, as the ONNX file has it, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class OnnxFile:
    """`content` as it was read, the graph in it with all tensors, the manifest that `export` wrote, and the SHA-256 of the
    file, whose manifest covers the weights too, wherever they are."""

    content: bytes
    proto: onnx.ModelProto
    manifest: NetworkManifest
    sha256: str
    weights: Weights | None = None


def read_onnx(path: Path) -> OnnxFile:
    """Reads a file that `modiff-trt export` wrote. Raises InputError if it is missing, damaged, or something else."""
    if not path.exists():
        raise InputError(f"ONNX file {path} does not exist; write one with `modiff-trt export`")
    data = read_file(path, "ONNX file")
    try:
        proto = onnx.load_from_string(data)
        outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    except Exception as error:  # protobuf raises DecodeError, and others for other damage
        raise InputError(
            f"ONNX file {path} cannot be loaded (truncated or altered?): {one_line(str(error)) or type(error).__name__}"
        ) from None
    if not proto.graph.node:
        raise InputError(f"ONNX file {path} cannot be loaded: it holds no network (ORT format, text, or another kind of file?)")
    weights = _take_in(path, outside) if outside else None
    return OnnxFile(data, proto, read_manifest(path, proto), sha256=digest_of(data), weights=weights)


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model with its modulated layers inlined, each convolution named after its layer: TensorRT's parser cannot
    read a convolution whose attributes are those of a function around it."""
    layers = {node.output[0]: node.name for node in model.graph.node if node.op_type == FUNCTION}
    inlined = onnx.inliner.inline_local_functions(model)
    producer = {output: node for node in inlined.graph.node for output in node.output}
    for output, layer in layers.items():
        node = producer[output]
        while node.op_type != "Conv":
            node = producer[next(name for name in node.input if name in producer)]
        node.name = layer
    return inlined


def write_outside(path: Path, model: onnx.ModelProto) -> None:
    """Writes a model with its large tensors in `<path>.data`. The model is left without them. Raises what writing raises."""
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= LEAST_OUTSIDE]
    data = path.with_name(path.name + DATA)
    with atomic_path(data) as temporary, temporary.open("wb") as file:
        for tensor in large:
            file.write(b"\0" * (-file.tell() % ALIGNED))
            place = {"location": data.name, "offset": file.tell(), "length": len(tensor.raw_data)}
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(temporary), full_check=True)


def _take_in(path: Path, tensors: list[onnx.TensorProto]) -> Weights:
    """Reads the tensors that lie in one file beside. Raises InputError for any other place, and for a file too short."""
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    names = {place.get("location", "") for place in places}
    name = names.pop()
    if names or not name or Path(name).name != name:
        raise InputError(f"ONNX file {path} keeps its weights in other places, which is not read; export it again")
    file = path.with_name(name)
    if not file.is_file():
        raise InputError(f"ONNX file {path} keeps its weights in {name}, which is not beside it; copy both, under their names")
    content = read_file(file, "file of weights")
    try:
        for tensor, place in zip(tensors, places, strict=True):
            offset, length = int(place["offset"]), int(place["length"])
            if min(offset, length) < 0 or offset + length > len(content):
                raise ValueError("beyond its end")
            tensor.raw_data = content[offset : offset + length]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    except (KeyError, ValueError):
        raise InputError(f"ONNX file {path} does not fit its weights {name} (truncated or altered?); export again") from None
    return Weights(name, content)
