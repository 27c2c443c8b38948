"""What travels inside an exported file, so that it can be sampled from with nothing else. No torch.

JSON under one metadata key: configuration, digests of checkpoint and scales, method and bits per layer, the timestep
sequence, and as base64 float32 the row table [R, L] and the start of every o_hat [C_out].
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np

# The modulated layer in the graph: its function, and the attributes of its convolution.
FUNCTION = "ModulatedConv"
CONV_ATTRIBUTES = ("kernel_shape", "pads", "strides")

MANIFEST_KEY = "modiff.manifest"
MANIFEST_SCHEMA = 2
# The manifest beside a plan, and the arrays that a trajectory begins from.
PLAN_SCHEMA = 2
START_KIND, START_SCHEMA = "start state", 1


def graph_digest(graph: Any) -> str:
    """SHA-256 over the constants and nodes of an ONNX graph: what the manifest says of the file it travels in."""
    digest = hashlib.sha256()
    for tensor in graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)} ".encode())
        digest.update(tensor.raw_data)
    for node in graph.node:
        digest.update(f"{node.op_type} {node.name} {list(node.input)} {list(node.output)} ".encode())
    return digest.hexdigest()


def encode_array(array: np.ndarray[Any, Any]) -> str:
    """A float32 array as base64 text."""
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode("ascii")


def decode_array(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The flat float32 array of `encode_array`. Raises ValueError when the text is damaged."""
    return np.frombuffer(base64.b64decode(text, validate=True), np.float32).copy()
