"""`docs/api.md`, from the signatures and docstrings of what `modiff_trt` exports.

python -m modiff_trt.tools.report.api_page docs/api.md [--check]
"""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

import modiff_trt
from modiff_trt.core.errors import InputError
from modiff_trt.tools.research.refusals import refuses_bad_input

HEAD = """# The API

Nine names, from `import modiff_trt`. Written by `python -m modiff_trt.tools.report.api_page`.

```python
from modiff_trt import denoiser, load_model, load_scales, sample

model = load_model(config="configs/demo.yml", ckpt="calib_cache/demo/model.safetensors")
scales = load_scales("calib_cache/demo/modiff-w8a8.safetensors", model)
images = sample(denoiser(model, scales, backend="native"), images=4, seed=0)  # float32 [4, 3, 32, 32], -1..1
```

The tenth is the module `modiff_trt.diffusers`, for those who work with diffusers' classes.
`ModiffUNet.from_pretrained(DIR, scales)` stands in place of a pipeline's `unet` (`examples/5_diffusers_unet.py`).
`ModiffPipeline.from_pretrained(DIR)` is of a folder that `quantize` wrote (`examples/6_quantized_folder.py`).
"""
OBJECTS = ("load_model", "load_scales", "denoiser", "sample")
STAGES = ("collect", "calibrate", "export_onnx", "build", "evaluate")


def section(name: str) -> str:
    """A name with its parameters and its docstring."""
    function = getattr(modiff_trt, name)
    hints, rows = get_type_hints(function, include_extras=True), []
    for parameter in inspect.signature(function).parameters.values():
        kind, words = _said(hints[parameter.name])
        rows.append(f"| `{parameter.name}` | {kind} | {_default(parameter.default)} | {words} |")
    body = " ".join((inspect.getdoc(function) or "").split())
    columns = ["| parameter | type | default | |", "|---|---|---|---|"]
    return "\n".join([f"## `{name}`", "", body, "", *columns, *rows, ""])


def _said(hint: Any) -> tuple[str, str]:
    """A parameter's type in words, and what its option says."""
    words = ""
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        words = next((option.help for option in extras if getattr(option, "help", None)), "")
    parts = get_args(hint) or (hint,)
    names = [getattr(part, "__name__", str(part)) for part in parts if part is not type(None)]
    return " or ".join(names), words.replace("|", "\\|")


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "needed"
    return f"`{value.value if isinstance(value, Enum) else value}`"


@refuses_bad_input
def main(
    document: Annotated[Path, typer.Argument(help="file to write")],
    check: Annotated[bool, typer.Option("--check", help="only compare; fails where the file is another")] = False,
) -> None:
    """Writes the page of the API."""
    stages = (
        "# Stages\n\nThe commands, with their options as keywords. They write the files that they name, and show progress.\n"
    )
    text = "\n".join([HEAD, *map(section, OBJECTS), stages, *map(section, STAGES)])
    if not check:
        document.write_text(text, encoding="utf-8")
    elif not document.exists() or document.read_text(encoding="utf-8") != text:
        raise InputError(f"{document} is not what the code says; write it again without --check")


if __name__ == "__main__":
    typer.run(main)
