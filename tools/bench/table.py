"""What `bench` prints of its result."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modiff_trt.core.costs import ModeCurve, costs_from_dict


def not_run(result: dict[str, Any]) -> list[str]:
    """A line for each backend that did not run at some batch size, with the reason."""
    lines = []
    for name, reasons in result.get("not_run", {}).items():
        for reason in dict.fromkeys(reasons.values()):
            batches = ", ".join(batch for batch, why in reasons.items() if why == reason)
            lines.append(f"{name} (batch {batches}): {reason}")
    return lines


def where(machine: dict[str, Any]) -> str:
    """The device that costs of modes are of."""
    return str(machine.get("gpu") or f"{machine['cores']} CPU cores")


def print_bench(result: dict[str, Any], curve: ModeCurve | None = None) -> None:
    """One line for each batch size and backend, with its ratio to the first backend, and one where `curve`'s prediction of
    native-auto was far off."""
    # Narrow enough for 80 columns: names of backends differ in their last letters.
    title = result["machine"].get("gpu") or result["machine"]["processor"]
    table = Table(title=f"{title}: one pass, and whole images", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("batch", "backend", "us/image", "images/s", "ratio", "GB", "state, MB"):
        table.add_column(heading, justify="left" if heading == "backend" else "right", no_wrap=True)
    for batch, rows in result["batches"].items():
        first = next(iter(rows.values()))["microseconds"]
        for name, row in rows.items():
            table.add_row(
                batch,
                name,
                f"{row['microseconds_an_image']:.1f}",
                f"{row['images_a_second']:.3g}",
                f"{first / row['microseconds']:.2f}x",
                f"{row['memory_bytes'] / 1e9:.2f}" if row["memory_bytes"] else "",
                f"{row['state_bytes_an_image'] / 1e6:.1f}",
            )
    Console().print(table)
    for line in not_run(result):
        Console().print(f"not run: {line}", soft_wrap=True)
    if curve is not None and curve.device == where(result["machine"]):
        row = result["batches"].get(str(curve.batch), {}).get("native-auto")
        if row is not None and (doubt := curve.doubt(row["microseconds_an_image"])):
            Console().print(f"native-auto: {doubt}", soft_wrap=True)


def print_costs(content: dict[str, Any]) -> None:
    """The whole pass at each batch size, and how well the costs of its parts predict mixtures."""
    for batch, entry in content["batches"].items():
        errors = ", ".join(f"{mixture['error']:+.1%}" for mixture in entry["mixtures"])
        Console().print(f"costs at batch {batch}: {entry['whole']:.2f} us an image; predictions of mixtures: {errors}")
        if doubt := costs_from_dict(entry).doubt():
            Console().print(doubt)
