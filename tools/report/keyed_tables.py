"""Tables of figures whose keys say what they are of: `LTQ A4`, `ddim quad 10`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def by_bits(part: dict[str, float | None], first: str) -> list[str]:
    """A table with one line per name and one column per activation width, from keys like `LTQ A4`."""
    names = list(dict.fromkeys(key.rsplit(" A", 1)[0] for key in part))
    bits = sorted({int(key.rsplit(" A", 1)[1]) for key in part}, reverse=True)
    lines = [f"| {first} | " + " | ".join(f"A{b}" for b in bits) + " |", "|---|" + "---|" * len(bits)]
    for name in names:
        cells = [part.get(f"{name} A{b}") for b in bits]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.1f}" for c in cells) + " |")
    return lines


def by_steps(part: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """The figures of each name by number of steps, from keys like `ddim quad 10`."""
    found: dict[str, dict[int, Any]] = {}
    for key, value in part.items():
        name, _, steps = key.rpartition(" ")
        found.setdefault(name, {})[int(steps)] = value
    return found


def table(heading: str, columns: list[Any], rows: Mapping[Any, list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {heading} | " + " | ".join(map(str, columns)) + " |", "|---|" + "---|" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
