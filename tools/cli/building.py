"""`modiff-trt build`: what the command prints about an engine."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def shown_name(layer: dict[str, Any]) -> str:
    """What an engine's layer computes: its first ONNX node that has a name, or the builder's name for it."""
    return str(next((node for node in layer["nodes"] if not node.startswith("node_of_")), layer["name"]))


def print_report(report: dict[str, Any], layers: bool) -> None:
    """The summary in two lines, and with `layers` every layer of the engine."""
    console = Console(highlight=False)
    if not report["told"]:
        console.print("this TensorRT's builder log does not list the engine's layers; what became of them is not known")
        return
    if layers:
        table = Table(title="layers of the engine, in order of execution")
        for heading in ("kind", "of", "inputs", "weights", "outputs", "kernel"):
            table.add_column(heading)
        for layer in report["table"]:
            table.add_row(
                layer["kind"],
                shown_name(layer),
                ", ".join(layer["inputs"][:2]),
                ", ".join(layer["constants"][:1]),
                ", ".join(layer["outputs"][:2]),
                layer["tactic"],
            )
        Console(width=None if console.is_terminal else 200).print(table)
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["kinds"].items())
    console.print(
        f"{report['layers']} layers: {kinds}; {report['generated_kernels_a_quantized_layer']} generated a quantized layer"
    )
    console.print(
        f"INT8: {report['plugin_layers']} plugins and {report['quantized_layers_in_int8']} convolutions, together of "
        f"{report['quantized_layers']} quantized layers; {report['convolutions'] - report['int8_convolutions']} in float"
    )
    if report["fell_back"]:
        console.print(f"not in INT8: {', '.join(report['fell_back'])}")
