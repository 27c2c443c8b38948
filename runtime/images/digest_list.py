"""manifest.sha256: a digest for every file of a set of images that we wrote, in the format of `sha256sum`. No torch.

A file is written first and listed afterwards. One that is not listed was left by a killed run, and is made again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import digest_of, locked, read_file, unwritable

SUMS = "manifest.sha256"


def read_sums(folder: Path) -> dict[str, str]:
    """Digest by file name; empty where there is no list. A line that a killed process left unfinished is passed over."""
    file = folder / SUMS
    if file.is_symlink():
        raise InputError(f"{file} is a link, which `sample` does not write; delete it, or choose another --out")
    lines = read_file(file, "list of digests").decode("ascii", "replace").splitlines() if file.exists() else []
    found = (line.split("  ", 1) for line in lines)
    return {part[1]: part[0] for part in found if len(part) == 2 and len(part[0]) == 64}


def append_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Adds files to the list, after those that other processes have added. Raises InputError if it cannot be written."""
    file = folder / SUMS
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    try:
        with locked(folder), file.open("a+b") as opened:
            end = opened.seek(0, os.SEEK_END)
            if end:
                opened.seek(end - 1)
                text = text if opened.read(1) == b"\n" else f"\n{text}"
            opened.write(text.encode("ascii"))
    except OSError as error:
        raise unwritable(file, error) from None


def read_listed(file: Path, sums: Mapping[str, str], what: str) -> bytes:
    """The bytes of a file of a set that has a list. Raises InputError if it is not listed, or was altered since."""
    data = read_file(file, what)
    digest = sums.get(file.name)
    if digest is None:
        raise InputError(f"{file} is not in {SUMS}: something else put it there, or `sample` was killed; run `sample` again")
    if digest != digest_of(data):
        raise InputError(
            f"{file} was altered after it was written: its digest in {SUMS} differs; delete it and run `sample` again"
        )
    return data
