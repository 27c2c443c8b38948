"""Renders the tables of README.md from the files under results/: `python -m modiff_trt.tools.results_tables README.md`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function of this module and a file
results/NAME.json. With --check nothing is written, and the exit code says whether the tables are current.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import atomic_path, read_json

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo(data: dict[str, Any]) -> str:
    """The demo's rows, as `modiff-trt demo` wrote them."""
    lines = ["| | PSNR to FP32, dB | seconds an image | state, MB an image | ONNX, MB |", "|---|---|---|---|---|"]
    for row in data["rows"]:
        decibel = "reference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        state, size = row["state_bytes_per_image"] / 1e6, row["onnx_bytes"] / 1e6
        lines.append(f"| {row['name']} | {decibel} | {row['seconds_per_image']:.2f} | {state:.1f} | {size:.1f} |")
    machine = data["machine"]
    lines.append("")
    lines.append(
        f"{data['images']} images, {data['ddim_steps']} DDIM steps, {machine['cores']} CPU cores, "
        f"onnxruntime {machine['onnxruntime']} (`results/demo.json`, written by `modiff-trt demo`)."
    )
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo}


def render(text: str, results: Path) -> str:
    """The text with every table block rendered anew. Raises InputError for an unknown table or a missing file."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise InputError(f"unknown table '{name}'; known: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](read_json(results / f'{name}.json', 'result'))}\n{match[3]}"

    return BLOCK.sub(replace, text)


def main(
    document: Annotated[Path, typer.Argument(help="the document whose tables are rendered")] = Path("README.md"),
    check: Annotated[bool, typer.Option(help="write nothing; fail if a table is not current")] = False,
) -> None:
    """Renders a document's tables from the JSON files in results/ beside it."""
    try:
        text = document.read_text(encoding="utf-8")
        rendered = render(text, document.parent / "results")
        if check and rendered != text:
            raise InputError(f"the tables of {document} are not those of results/; run `make results-tables`")
        if not check:
            with atomic_path(document) as temporary:
                temporary.write_text(rendered, encoding="utf-8")
    except (InputError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
