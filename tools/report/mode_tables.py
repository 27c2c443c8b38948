"""The tables of what a layer's mode costs, and of the curves that calibration found with it."""

from __future__ import annotations

from typing import Any

from modiff_trt.tools.report.keyed_tables import table


def mode_costs(data: dict[str, Any]) -> str:
    """Microseconds an image of each kind of layer in another mode, measured and modelled."""
    lines = {}
    for entry in data["costs"]:
        cells = [str(entry["count"]), entry["mode"]]
        for mode in ("int8", "float"):
            cells.append("" if mode not in entry else f"{entry[mode]:+.3f}")
            cells.append("" if mode not in entry else f"{entry[f'{mode} modelled']:+.3f}")
        lines[f"{entry['layers']} ({entry['first']})"] = cells
    headings = ["layers", "mode", "as INT8", "modelled", "as float", "modelled"]
    note = (
        f"\nMicroseconds an image and pass that one such layer adds in the other mode, batch 256, {data['machine']['gpu']}; "
        f"the whole pass takes {data['whole_us']:.2f} (`results/modes_h200.json`). Cut off by the time limit: kinds are "
        "missing, and the check on mixtures."
    )
    return "\n".join([*table("kind of layer (the first)", headings, lines), note])


def mode_curves(data: dict[str, Any]) -> str:
    """PSNR by the number of layers that keep state."""
    parts = []
    for name, points in data["curves"].items():
        cells = [[str(p["layers_with_state"]) for p in points], [f"{p['psnr_db']:.1f}" for p in points]]
        parts += [f"{name}:", "", *table("layers with state", cells[0], {"PSNR, dB": cells[1]}), ""]
    return "\n".join(parts[:-1])


def biases(data: dict[str, Any]) -> str:
    """PSNR of rounded weights alone, before and after bias correction."""
    lines = {}
    for row in data["rows"]:
        cells = [row["before"], row["equal"], row["final image"]]
        lines[f"{row['network']}, {row['images']} images"] = ["" if cell is None else f"{cell:.1f}" for cell in cells]
    headings = ["without", "corrected, steps alike", "corrected, steps by the final image"]
    return "\n".join(table("weights alone, dB to FP32", headings, lines))
