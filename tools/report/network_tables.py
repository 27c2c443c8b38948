"""The tables of networks: how near their answers are to diffusers', and what the method takes at their size."""

from __future__ import annotations

from typing import Any

from modiff_trt.tools.report.keyed_tables import table


def layouts(data: dict[str, Any]) -> str:
    """The largest difference to diffusers of each network."""
    lines = {
        name: [
            f"{row['parameters'] / 1e6:.0f}",
            str(row["layers"]),
            "x".join(map(str, row["input"])),
            f"{row['largest_difference']:.1e}",
        ]
        for name, row in data["networks"].items()
    }
    return "\n".join(table("network", ["parameters, M", "layers", "input", "largest difference"], lines))
