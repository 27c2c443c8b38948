"""What a built engine consists of, read from the builder's verbose log (an engine inspector would need a GPU)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

TENSOR = re.compile(r"Name: (?P<name>[^,]+),.*?Datatype: (?P<type>\w+), Format: (?:\((?P<format>\w+)\))?")
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
HEAD = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>Inputs: .*)")
TACTIC = re.compile(r", TacticName: ([^,]*),")
# Lists of tensors in a layer's line; kernels that the builder generates have constants besides.
LISTS = ("Inputs: [", "Constants: [", "Outputs: [")
CONVOLUTION = "correlation"
GENERATED = "kgen"
PLUGIN = "PluginV3"
NO_WORK = ("shape_call", "Constant")


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
        head = HEAD.match(line)
        if head is None:
            break
        inputs, constants, outputs = (_tensors(head["rest"], name) for name in LISTS)
        tactic, nodes = TACTIC.search(line), tuple(ONNX_NODE.findall(line))
        found.append(
            EngineLayer(
                head["name"],
                head["kind"],
                inputs,
                constants=constants,
                outputs=outputs,
                tactic=tactic[1].strip() if tactic else "",
                nodes=nodes,
            )
        )
    return [layer for layer in found if layer.kind not in NO_WORK]


def _tensors(text: str, name: str) -> tuple[str, ...]:
    """Types and formats of the list `name`, which ends where the next begins."""
    at = text.find(name)
    if at < 0:
        return ()
    ends = [text.find(other, at + len(name)) for other in (*LISTS, ", TacticName: ", ", PluginType: ")]
    part = text[at : min((end for end in ends if end > 0), default=len(text))]
    return tuple(f"{t['type']} {t['format'] or 'chosen at run time'}" for t in TENSOR.finditer(part))


def summarize(layers: list[EngineLayer], quantized: Iterable[str]) -> dict[str, Any]:
    """Counts by kind, the convolutions in INT8, the layers that are plugins, and those of the `quantized` layers that are
    neither and so fell back to another type."""
    convolutions = {node: layer for layer in layers if layer.kind == CONVOLUTION for node in layer.nodes}
    names = list(quantized)
    int8 = [n for n in names if n in convolutions and is_int8(convolutions[n])]
    plugins = [layer.name for layer in layers if layer.kind == PLUGIN]
    kinds = Counter(layer.kind for layer in layers)
    return {
        "told": bool(layers),  # what the builder does not tell is not known
        "layers": len(layers),
        "kinds": dict(sorted(kinds.items())),
        "convolutions": kinds[CONVOLUTION],
        "int8_convolutions": sum(is_int8(layer) for layer in layers if layer.kind == CONVOLUTION),
        "quantized_layers": len(names),
        "quantized_layers_in_int8": len(int8),
        "plugin_layers": len(plugins),
        "fell_back": [n for n in names if n not in int8 and n not in plugins] if layers else [],
        "generated_kernels_a_quantized_layer": round(kinds[GENERATED] / max(len(names), 1), 2),
        "table": [asdict(layer) for layer in layers],
    }


def is_int8(layer: EngineLayer) -> bool:
    """Whether a convolution multiplies INT8 by INT8."""
    operands = (*layer.inputs[:1], *layer.constants[:1])
    return len(operands) == 2 and all(tensor.startswith("Int8") for tensor in operands)
