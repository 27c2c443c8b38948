"""Which files of a folder are the pictures of a set, in which order, and how one becomes 8-bit RGB. No torch.

The rule is pytorch-fid's where that has one: the files with its suffixes directly in the folder, each by Pillow's
`convert("RGB")`. Beyond it: suffixes in any case; names in natural order (2 before 10); where a folder itself has no picture,
those of its subfolders (one a class, say) but for hidden ones and tools' own. Whatever is left out, or loses something by the
conversion, is counted in the notes of the set.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modiff_trt.core.errors import InputError, is_out_of_memory, one_line
from modiff_trt.core.files import atomic_path

Images = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Folders that tools make beside the images of a set.
TOOL_FOLDERS = {"grid", "grids", "preview", "previews", "thumbnail", "thumbnails", "__macosx", "__pycache__"}
ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}
# Pixels between the images of a sheet.
GAP = 2
# Converted to RGB, these are cut off at 255.
WIDE_MODES = ("I", "F")


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, in natural order of their names, and what has to be said of them, one line each."""

    files: tuple[Path, ...]
    size: tuple[int, int]
    notes: tuple[str, ...]


def natural_key(name: str) -> tuple[Any, ...]:
    """Sorts names by the numbers in them: `sample_2` before `sample_10`. Names that differ have different keys."""
    parts = re.split(r"([0-9]+)", name)
    return (*((int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)), (-2, name))


def save_sheet(path: Path, images: Images) -> None:
    """One picture of images uint8 [N, H, W, C], row by row, about as wide as it is high. Written whole or not at all."""
    n, height, width, channels = images.shape
    columns = max(1, min(n, round(float(np.sqrt(n * height / width)))))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    with atomic_path(path) as temporary:
        Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(temporary, format="PNG", optimize=True)


def find_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a set in their order, and notes of what was left out."""
    files = _walk(folder)
    pictures = [file for file in files if _is_picture(file)]
    direct = [file for file in pictures if file.parent == folder]
    taken = direct or [file for file in pictures if not _of_a_tool(file.relative_to(folder))]
    notes = []
    if taken and len(taken) < len(pictures):
        where = "subfolders of" if direct else "hidden folders, or folders of tools, under"
        notes.append(f"{len(pictures) - len(taken)} pictures in {where} {folder} were left out")
    others = Counter(
        f.suffix.lower() for f in files if not _is_picture(f) and _counts(f) and (not direct or f.parent == folder)
    )
    if taken and others:
        by_suffix = ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items()))
        notes.append(f"{others.total()} files in {folder} were left out, which are no pictures here: {by_suffix}")
    return sorted(taken, key=lambda f: [natural_key(part) for part in f.relative_to(folder).parts]), notes


def survey(files: Iterable[Path], folder: Path) -> Pictures:
    """Looks at the header of every picture before any is used. Raises InputError for one that cannot be read, that has another
    size than the first, or whose depth the conversion to 8 bits would cut off."""
    found: list[Path] = []
    size: tuple[int, int] | None = None
    counts: Counter[str] = Counter()
    for file in files:
        with open_picture(file, file) as image:
            here = (image.height, image.width)
            counts.update(_losses(image, file))
        size = size or here
        if here != size:
            raise InputError(f"{folder} holds images of different sizes: {size} and {here} ({file.name})")
        found.append(file)
    assert size is not None
    return Pictures(tuple(found), size, tuple(f"{n} of {len(found)} pictures in {folder} {what}" for what, n in counts.items()))


def open_picture(source: Path | io.BytesIO, file: Path) -> Image.Image:
    """A picture whose pixels are not read yet. Raises InputError, naming `file`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(source)
    except Exception as error:  # decoders of many formats raise nearly anything
        raise _unreadable(file, error) from None


def decode(data: bytes, file: Path) -> Images:
    """A picture as uint8 [1, H, W, 3]. Raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(open_picture(io.BytesIO(data), file).convert("RGB"))[None]
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return error
    return InputError(f"{file} cannot be read: {one_line(str(error)) or type(error).__name__}")


def _losses(image: Image.Image, file: Path) -> list[str]:
    tiles = str(getattr(image, "tile", ""))
    if image.mode.split(";")[0] in WIDE_MODES:
        raise InputError(
            f"{file} has more than 8 bits a channel (mode {image.mode}), which would be cut off; save it in 8 bits"
        )
    losses = ["have 16 bits a channel, of which the lower 8 are dropped"] if ";16" in tiles else []
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        losses.append("have an alpha channel, which is dropped")
    if getattr(image, "n_frames", 1) > 1:
        losses.append("have several frames, of which the first counts")
    return losses


def _walk(folder: Path) -> list[Path]:
    """Every regular file under a folder. Links to folders are not followed; a pipe would be waited for without end."""
    try:
        list(folder.iterdir())
        return [file for file in folder.rglob("*") if file.is_file()]
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror or error}") from None


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _of_a_tool(relative: Path) -> bool:
    return any(part.startswith(".") or part.lower() in TOOL_FOLDERS for part in relative.parts[:-1])


def _counts(file: Path) -> bool:
    """Whether a file that is no picture is worth a word: lists, notes and hidden files are not."""
    return not file.name.startswith(".") and file.suffix.lower() not in {"", ".json", ".txt", ".csv", ".md", ".yml", ".yaml"}
