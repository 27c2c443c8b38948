"""What travels inside an exported file, so that it can be sampled from with nothing else. No torch.

JSON under one metadata key: configuration, digests of checkpoint and scales, method and bits per layer, the timestep
sequence, and as base64 float32 the row table [R, L] and the start of every o_hat [C_out].
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

# The modulated layer in the graph: its function, and the attributes of its convolution.
FUNCTION = "ModulatedConv"
CONV_ATTRIBUTES = ("kernel_shape", "pads", "strides")

MANIFEST_KEY = "modiff.manifest"
MANIFEST_SCHEMA = 1


def encode_array(array: np.ndarray[Any, Any]) -> str:
    """A float32 array as base64 text."""
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode("ascii")


def decode_array(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The flat float32 array of `encode_array`. Raises ValueError when the text is damaged."""
    return np.frombuffer(base64.b64decode(text, validate=True), np.float32).copy()
