"""Image sets, read batch by batch: folders of pictures or shards, an .npz of uint8 images, CIFAR-10's archive. No torch."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import sha256

Images = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
NPZ_KEYS = ("images", "arr_0")  # ours, and guided-diffusion's
SHARDS = "images-*.npy"
CIFAR_RECORD = 1 + 3 * 32 * 32
CHUNK = 512


@dataclass(frozen=True)
class ImageSet:
    """`count` images uint8 [height, width, 3]; nothing is held in memory but the batch that is read."""

    path: Path
    count: int
    shape: tuple[int, int]
    chunks: Callable[[], Iterator[Images]]

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
        """SHA-256 of the file, or of a folder's names, sizes and times of change."""
        if self.path.is_file():
            return sha256(self.path)
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in {*SUFFIXES, ".npy"}:
                stat = file.stat()
                digest.update(f"{file.relative_to(self.path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_images(path: Path) -> ImageSet:
    """A folder of pictures or of shards, an .npz (`images`, or guided-diffusion's `arr_0`), or cifar-10-binary.tar.gz
    (its training batches). Raises InputError when nothing fits."""
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
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"folder {path} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no shards ({SHARDS})")

    def read(file: Path) -> Images:
        try:
            return np.asarray(Image.open(file).convert("RGB"))[None]
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error}") from None

    height, width, _ = read(files[0])[0].shape
    return ImageSet(path, len(files), (height, width), lambda: map(read, files))


def shard_name(indices: list[int]) -> str:
    return f"images-{indices[0]:06d}-{indices[-1]:06d}.npy"


def _shards(path: Path) -> ImageSet:
    files = sorted(path.glob(SHARDS))
    following: int | None = None
    arrays = []
    for file in files:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            first, last = (int(part) for part in file.stem.split("-")[1:])
        except (OSError, ValueError) as error:
            raise InputError(f"shard {file} cannot be read ({error}); delete it and sample again") from None
        if following is not None and first != following:
            raise InputError(f"{path}: images {following} to {first - 1} are missing; run the same `sample` command again")
        if array.ndim != 4 or array.dtype != np.uint8 or len(array) != last - first + 1:
            raise InputError(f"shard {file} does not hold the images that its name says; delete it and sample again")
        following = last + 1
        arrays.append(array)
    count = sum(map(len, arrays))
    return ImageSet(path, count, arrays[0].shape[1:3], lambda: (np.array(array) for array in arrays))


def _npz(path: Path) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            for key in NPZ_KEYS:
                if f"{key}.npy" in archive.namelist():
                    with archive.open(f"{key}.npy") as file:
                        shape, dtype = _npy_header(file)
                    if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3:
                        return ImageSet(path, shape[0], shape[1:3], partial(_npz_chunks, path, f"{key}.npy"))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    raise InputError(f"{path} has no uint8 array [N, H, W, 3] named {' or '.join(NPZ_KEYS)}")


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
                yield np.frombuffer(file.read(n * size), np.uint8).reshape(n, *shape[1:])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
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
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not found:
        raise InputError(f"{path} holds no {prefix}*.bin; the binary version of CIFAR-10 is needed (no pickle is read)")
