"""What an installation takes: seconds, megabytes and packages of new virtual environments.

python -m modiff_trt.tools.research.installs "pip install .=. torch==2.13.*" "sampler=-r s/requirements.txt" --out F.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.research.refusals import refuses_bad_input


@refuses_bad_input
def main(
    environments: Annotated[list[str], typer.Argument(help="NAME=ARGUMENTS of pip install, each in an environment of its own")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
) -> None:
    """Installs each into a new virtual environment, which is removed again."""
    result: dict[str, Any] = {"environments": {}} | provenance()
    for entry in environments:
        name, _, arguments = entry.partition("=")
        if not arguments:
            raise InputError(f"an environment is given as NAME=ARGUMENTS, found '{entry}'")
        result["environments"][name] = row = _measure(arguments.split())
        typer.echo(f"{name}: {row['seconds']:.0f} s, {row['bytes'] / 1e6:.0f} MB, {row['packages']} packages")
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def _measure(arguments: list[str]) -> dict[str, Any]:
    """Of `pip install`; the environment's own pip is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python, before = str(Path(folder) / "bin/python"), _bytes(Path(folder))
        begin = time.monotonic()
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError(f"pip install {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
        seconds = time.monotonic() - begin
        listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
        names = [package["name"] for package in json.loads(listed.stdout)]
        kept = len([name for name in names if name not in ("pip", "setuptools")])
        return {"seconds": seconds, "bytes": _bytes(Path(folder)) - before, "packages": kept, "arguments": " ".join(arguments)}


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    typer.run(main)
