"""Image sets, read batch by batch: folders of pictures or shards, an .npz of uint8 images, CIFAR-10's archive. No torch."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import read_json, sha256
from modiff_trt.export.manifest import MANIFEST

Images = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
NPZ_KEYS = ("images", "arr_0")  # ours, and guided-diffusion's
SHARDS = "images-*.npy"
CIFAR_RECORD = 1 + 3 * 32 * 32
CHUNK = 512
# What numpy, zipfile, zlib and Pillow raise for damaged files.
READ_ERRORS = (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ImageSet:
    """`count` images uint8 [height, width, 3]; nothing is held in memory but the batch that is read. `first` is the index of
    the first one in its series, and `manifest` what made them, where `modiff-trt sample` did."""

    path: Path
    count: int
    shape: tuple[int, int]
    chunks: Callable[[], Iterator[Images]]
    first: int | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[Images]:
        """The images in order, uint8 [n, H, W, 3] with n = size but for the last. Raises InputError if one cannot be read."""
        kept: list[Images] = []
        held = 0
        for chunk in self.chunks():
            if chunk.shape[1:] != (*self.shape, 3) or chunk.dtype != np.uint8:
                raise InputError(f"{self.path} holds images of different sizes: {self.shape} and {chunk.shape[1:3]}")
            kept.append(chunk)
            held += len(chunk)
            while held >= size:
                together = np.concatenate(kept) if len(kept) > 1 else kept[0]
                yield together[:size]
                kept, held = [together[size:]], held - size
        if held:
            yield np.concatenate(kept)

    def fingerprint(self) -> str:
        """SHA-256 of the file, or of a folder's names, sizes and times of change: quick, and another for a copy."""

        def stamp(file: Path) -> str:
            return f"{file.stat().st_size} {file.stat().st_mtime_ns}"

        return self._digest(stamp)

    def content_sha256(self) -> str:
        """SHA-256 of the file, or of a folder's names and files."""
        return self._digest(sha256)

    def _digest(self, of: Callable[[Path], str]) -> str:
        if self.path.is_file():
            return sha256(self.path)
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in {*SUFFIXES, ".npy"}:
                digest.update(f"{file.relative_to(self.path)} {of(file)}\n".encode())
        return digest.hexdigest()


def open_images(path: Path) -> ImageSet:
    """A folder of pictures or of shards, an .npz (`images`, or guided-diffusion's `arr_0`), or cifar-10-binary.tar.gz
    (its training batches). Raises InputError when nothing fits, or there is no image."""
    found = _open(path)
    if found.count == 0:
        raise InputError(f"{path} holds no image")
    return found


def _open(path: Path) -> ImageSet:
    if path.is_dir():
        return _shards(path) if any(path.glob(SHARDS)) else _pictures(path)
    if not path.exists():
        raise InputError(f"images {path} not found; pass a folder of pictures, an .npz or cifar-10-binary.tar.gz")
    if path.suffix == ".npz":
        return _npz(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        count = sum(len(images) for images, _ in cifar_batches(path, "data_batch"))
        return ImageSet(path, count, (32, 32), lambda: (images for images, _ in cifar_batches(path, "data_batch")))
    raise InputError(f"images {path} are of unknown kind; pass a folder of pictures, an .npz or cifar-10-binary.tar.gz")


def load_images(path: Path, size: int) -> Images:
    """All images at once, uint8 [N, size, size, 3]. Raises InputError when they have another size."""
    found = open_images(path)
    if found.shape != (size, size):
        raise InputError(f"{path} holds images of shape {found.shape}, the model needs ({size}, {size})")
    return np.concatenate(list(found.batches(CHUNK)))


def _pictures(path: Path) -> ImageSet:
    files = sorted((f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES), key=_place)
    if not files:
        raise InputError(f"folder {path} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no shards ({SHARDS})")
    first, manifest = None, _manifest(path)
    if (path / MANIFEST).exists():
        numbers = [int(f.stem) for f in files if f.stem.isdecimal()]
        if len(numbers) == len(files) and numbers[-1] - numbers[0] + 1 != len(files):
            raise InputError(f"{path}: some images between {numbers[0]} and {numbers[-1]} are missing; run its `sample` again")
        first = numbers[0] if len(numbers) == len(files) else None

    def read(file: Path) -> Images:
        try:
            return np.asarray(Image.open(file).convert("RGB"))[None]
        except (*READ_ERRORS, Image.DecompressionBombError) as error:
            raise InputError(f"{file} cannot be read: {error}") from None

    height, width, _ = read(files[0])[0].shape
    return ImageSet(path, len(files), (height, width), lambda: map(read, files), first, manifest)


def _place(file: Path) -> tuple[Path, int, str]:
    """Pictures that are named by a number are sorted by it."""
    return file.parent, int(file.stem) if file.stem.isdecimal() else -1, file.name


def shard_name(first: int, last: int) -> str:
    return f"images-{first:06d}-{last:06d}.npy"


def shard_range(file: Path) -> tuple[int, int]:
    """(first, last) image of a shard, from its name. Raises InputError if the name is not one."""
    try:
        first, last = (int(part) for part in file.stem.split("-")[1:])
    except ValueError:
        raise InputError(f"{file} is not named like a shard; move it elsewhere") from None
    return first, last


def _shards(path: Path) -> ImageSet:
    files = sorted(path.glob(SHARDS), key=shard_range)
    following: int | None = None
    shape: tuple[int, ...] = ()
    for file in files:
        first, last = shard_range(file)
        if following is not None and first > following:
            raise InputError(f"{path}: images {following} to {first - 1} are missing; run the same `sample` command again")
        if following is not None and first < following:
            raise InputError(f"{path}: {file.name} overlaps the shard before it; delete one of them")
        try:
            with file.open("rb") as opened:
                shape, dtype = _npy_header(opened)
        except READ_ERRORS as error:
            raise InputError(f"shard {file} cannot be read ({error}); delete it and sample again") from None
        if len(shape) != 4 or dtype != np.uint8 or shape[0] != last - first + 1:
            raise InputError(f"shard {file} does not hold the images that its name says; delete it and sample again")
        following = last + 1
    begin, end = shard_range(files[0])[0], shard_range(files[-1])[1] + 1
    return ImageSet(path, end - begin, (shape[1], shape[2]), lambda: map(_read_shard, files), begin, _manifest(path))


def _read_shard(file: Path) -> Images:
    try:
        return _three_channels(np.load(file, allow_pickle=False))
    except READ_ERRORS as error:
        raise InputError(f"shard {file} cannot be read ({error}); delete it and sample again") from None


def _three_channels(images: Images) -> Images:
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def _npz(path: Path) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            for key in NPZ_KEYS:
                if f"{key}.npy" in archive.namelist():
                    with archive.open(f"{key}.npy") as file:
                        shape, dtype = _npy_header(file)
                    if dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3):
                        chunks = partial(_npz_chunks, path, f"{key}.npy")
                        return ImageSet(path, shape[0], shape[1:3], chunks, *_npz_origin(path))
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    raise InputError(f"{path} has no uint8 array [N, H, W, 3] named {' or '.join(NPZ_KEYS)}")


def _npz_origin(path: Path) -> tuple[int | None, dict[str, Any]]:
    """(`first`, `manifest`) of an .npz that `sample` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            first, manifest = int(file["indices"][0]), json.loads(str(file["manifest"]))
    except (*READ_ERRORS, IndexError, TypeError, KeyError):
        return None, {}  # another tool's
    return first, manifest if isinstance(manifest, dict) else {}


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    about = read_json(file, "manifest") if file.exists() else {}
    return about if isinstance(about, dict) else {}


def has_images(path: Path) -> bool:
    """Whether an .npz holds images under one of our names. Raises InputError if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(f"{key}.npy" in archive.namelist() for key in NPZ_KEYS)
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _npy_header(file: Any) -> tuple[Any, Any]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise ValueError("its array is in Fortran order; save it with numpy.ascontiguousarray")
    return shape, dtype


def _npz_chunks(path: Path, member: str) -> Iterator[Images]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as opened:
            file = cast(BinaryIO, opened)
            shape, _ = _npy_header(file)
            size = int(np.prod(shape[1:]))
            for begin in range(0, shape[0], CHUNK):
                n = min(CHUNK, shape[0] - begin)
                yield _three_channels(np.frombuffer(file.read(n * size), np.uint8).reshape(n, *shape[1:]))
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read (truncated?): {error}") from None


def cifar_batches(path: Path, prefix: str) -> Iterator[tuple[Images, Images]]:
    """(images [n, 32, 32, 3], labels [n]), uint8, of each file of CIFAR-10's binary archive whose name begins with `prefix`.
    Raises InputError if there is none."""
    found = False
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                name = Path(member.name).name
                if name.startswith(prefix) and name.endswith(".bin"):
                    file = archive.extractfile(member)
                    assert file is not None
                    rows = np.frombuffer(file.read(), np.uint8).reshape(-1, CIFAR_RECORD)
                    found = True
                    yield rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    except (*READ_ERRORS, tarfile.TarError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not found:
        raise InputError(f"{path} holds no {prefix}*.bin; the binary version of CIFAR-10 is needed (no pickle is read)")
