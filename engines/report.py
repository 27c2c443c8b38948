"""What a built engine consists of, read from the builder's verbose log (an engine inspector would need a GPU)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

TENSOR = re.compile(r"Name: (?P<name>[^,]+),.*?Datatype: (?P<type>\w+), Format: \((?P<format>\w+)\)")
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# The fields of a layer's line, in this order; a field ends where the next begins.
FIELDS = ("Name: ", ", LayerType: ", ", Inputs: [", ", Constants: [", ", Outputs: [", ", TacticName: ", ", StreamId: ")
CONVOLUTION = "correlation"
GENERATED = "kgen"


@dataclass(frozen=True)
class EngineLayer:
    """One layer: its kind, the types (and formats) of its inputs, weights and outputs, its kernel, and its ONNX nodes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]


def read_layers(log: Iterable[str]) -> list[EngineLayer]:
    """The layers of the engine that was built last, in the order of execution; empty if the log does not tell them."""
    lines = [line for text in log for line in text.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.strip() == "Layers:"]
    found = []
    for line in lines[starts[-1] + 1 :] if starts else []:
        fields = _fields(line)
        if fields is None:
            break
        name, kind, *tensors, tactic = fields
        inputs, constants, outputs = (tuple(f"{t['type']} {t['format']}" for t in TENSOR.finditer(text)) for text in tensors)
        found.append(EngineLayer(name, kind, inputs, constants, outputs, tactic.strip(), tuple(ONNX_NODE.findall(line))))
    return found


def _fields(line: str) -> list[str] | None:
    at = [line.find(field) for field in FIELDS]
    if at[0] != 0 or min(at) < 0 or at != sorted(at):
        return None
    return [line[begin + len(field) : end] for begin, field, end in zip(at, FIELDS, at[1:], strict=False)]


def summarize(layers: list[EngineLayer], quantized: Iterable[str]) -> dict[str, Any]:
    """Counts by kind, the convolutions in INT8, and those of the `quantized` layers that fell back to another type."""
    convolutions = {node: layer for layer in layers if layer.kind == CONVOLUTION for node in layer.nodes}
    names = list(quantized)
    int8 = [n for n in names if n in convolutions and is_int8(convolutions[n])]
    kinds = Counter(layer.kind for layer in layers)
    return {
        "layers": len(layers),
        "kinds": dict(sorted(kinds.items())),
        "convolutions": kinds[CONVOLUTION],
        "int8_convolutions": sum(is_int8(layer) for layer in layers if layer.kind == CONVOLUTION),
        "quantized_layers": len(names),
        "quantized_layers_in_int8": len(int8),
        "fell_back": [n for n in names if n not in int8],
        "generated_kernels_a_quantized_layer": round(kinds[GENERATED] / max(len(names), 1), 2),
        "table": [asdict(layer) for layer in layers],
    }


def is_int8(layer: EngineLayer) -> bool:
    """Whether a convolution multiplies INT8 by INT8."""
    operands = (*layer.inputs[:1], *layer.constants[:1])
    return len(operands) == 2 and all(tensor.startswith("Int8") for tensor in operands)
