"""An exported ONNX file as it lies on disk, read once: its bytes, graph, manifest and digest. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from modiff_trt.core.errors import InputError, one_line
from modiff_trt.core.files import digest_of, read_file
from modiff_trt.core.manifest import NetworkManifest, read_manifest


@dataclass(frozen=True)
class OnnxFile:
    """`content` as it was read, the graph in it, the manifest that `export` wrote, and the SHA-256 of the file."""

    content: bytes
    proto: onnx.ModelProto
    manifest: NetworkManifest
    sha256: str


def read_onnx(path: Path) -> OnnxFile:
    """Reads a file that `modiff-trt export` wrote. Raises InputError if it is missing, damaged, or something else."""
    if not path.exists():
        raise InputError(f"ONNX file {path} does not exist; write one with `modiff-trt export`")
    data = read_file(path, "ONNX file")
    try:
        proto = onnx.load_from_string(data)
        outside = any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    except Exception as error:  # protobuf raises DecodeError, and others for other damage
        raise InputError(
            f"ONNX file {path} cannot be loaded (truncated or altered?): {one_line(str(error)) or type(error).__name__}"
        ) from None
    if not proto.graph.node:
        raise InputError(f"ONNX file {path} cannot be loaded: it holds no network (ORT format, text, or another kind of file?)")
    if outside:
        raise InputError(f"ONNX file {path} keeps its weights in other files, which is not read; export it again")
    return OnnxFile(data, proto, read_manifest(path, proto), sha256=digest_of(data))
