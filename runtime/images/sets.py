"""Image sets, read batch by batch: folders of pictures or shards, an .npz of uint8 images, CIFAR-10's archive. No torch."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from modiff_trt.core.errors import InputError, one_line, shown
from modiff_trt.core.files import CONTENT, check_signed, digest_of, parse_json, read_file, read_json, sha256, signed
from modiff_trt.core.manifest import MANIFEST
from modiff_trt.core.npy import npy_header, read_npy, read_npz
from modiff_trt.runtime.images.digest_list import SUMS, read_listed, read_sums
from modiff_trt.runtime.images.pictures import SUFFIXES, Images, decode, find_pictures, open_picture, survey

NPZ_KEYS = ("images", "arr_0")  # ours, and guided-diffusion's
SHARDS = "images-*.npy"
CIFAR_RECORD = 1 + 3 * 32 * 32
CHUNK = 512
# What zipfile and zlib raise for damaged files.
READ_ERRORS = (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
# What every manifest of a set of images that `sample` made has.
OURS = {"seed", "eta", "batch_size"}
# Of the arrays beside the manifest in an .npz of ours.
IMAGES_DIGEST, INDICES_DIGEST = "images_sha256", "indices_sha256"
SAMPLE_AGAIN = "run `sample` again, into another folder"


@dataclass(frozen=True)
class ImageSet:
    """`count` images uint8 [height, width, 3]; nothing is held in memory but the batch that is read.

    `names` are what the images are called, without suffixes, where they have names. `first` is the index of the first one in
    its series, and `manifest` what made them, where `modiff-trt sample` did. `notes` say what was left out, one line each.
    """

    path: Path
    count: int
    shape: tuple[int, int]
    chunks: Callable[[], Iterator[Images]]
    first: int | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    # Where each image stands when the files are sorted by their paths as text, as torch-fidelity does; None: as here.
    ranks: Sequence[int] | None = None

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
        """SHA-256 of names, sizes and times of change: quick, to see whether files changed while they were read."""

        def stamp(file: Path) -> str:
            return f"{file.stat().st_ino} {file.stat().st_size} {file.stat().st_mtime_ns}"

        return self._digest(stamp)

    @cached_property
    def _stamp(self) -> str:
        """The fingerprint before anything of the set was used."""
        return self.fingerprint()

    @cached_property
    def _content(self) -> str:
        _ = self._stamp
        return sha256(self.path) if self.path.is_file() else self._digest(sha256)

    def content_sha256(self) -> str:
        """SHA-256 of the file, or of a folder's names and files; computed once."""
        return self._content

    def check_unchanged(self) -> None:
        """Called before and after the images are read. Raises InputError if the files have changed since their digest was
        computed, or since this was called first."""
        if self.fingerprint() != self._stamp:
            raise InputError(f"{self.path} changed while it was measured; run the command again when nothing writes there")

    def _digest(self, of: Callable[[Path], str]) -> str:
        files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*"))
        digest = hashlib.sha256()
        for file in files:
            if self.path.is_file() or (file.suffix.lower() in {*SUFFIXES, ".npy"} and file.is_file()):
                digest.update(os.fsencode(file.relative_to(self.path)) + f" {of(file)}\n".encode())
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
    if not path.is_file():
        raise InputError(f"images {path} are neither a folder nor a file")
    if path.suffix == ".npz":
        return _npz(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        count = sum(len(images) for images, _ in cifar_batches(path, "data_batch"))
        return ImageSet(path, count, (32, 32), chunks=lambda: (images for images, _ in cifar_batches(path, "data_batch")))
    raise InputError(f"images {path} are of unknown kind; pass a folder of pictures, an .npz or cifar-10-binary.tar.gz")


def load_images(path: Path, size: int) -> Images:
    """All images at once, uint8 [N, size, size, 3]. Raises InputError when they have another size."""
    found = open_images(path)
    if found.shape != (size, size):
        raise InputError(f"{path} holds images of shape {found.shape}, the model needs ({size}, {size})")
    return np.concatenate(list(found.batches(CHUNK)))


def _pictures(path: Path) -> ImageSet:
    files, notes = find_pictures(path)
    if not files:
        raise InputError(f"folder {path} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no shards ({SHARDS})")
    manifest = read_manifest(path)
    if manifest is None:
        found = survey(files, path)
        names = [file.relative_to(path).with_suffix("").as_posix() for file in files]
        chunks = partial(_decoded, found.files, None)
        ranks = {file: rank for rank, file in enumerate(sorted(map(str, files)))}
        notes += found.notes
        return ImageSet(
            path,
            len(files),
            found.size,
            chunks=chunks,
            first=None,
            manifest={},
            names=names,
            notes=tuple(notes),
            ranks=[ranks[str(f)] for f in files],
        )
    numbers = [int(f.stem) for f in files if f.stem.isascii() and f.stem.isdecimal() and f.suffix == ".png"]
    if len(numbers) != len(files):
        raise InputError(f"{path} holds pictures that `sample` did not make beside those that it did; move them elsewhere")
    if numbers[-1] - numbers[0] + 1 != len(files):
        raise InputError(f"{path}: some images between {numbers[0]} and {numbers[-1]} are missing; run its `sample` again")
    sums = read_sums(path)
    with open_picture(io.BytesIO(read_listed(files[0], sums, "picture")), files[0]) as image:
        shape = (image.height, image.width)
    chunks = partial(_decoded, tuple(files), sums)
    return ImageSet(
        path,
        len(files),
        shape,
        chunks=chunks,
        first=numbers[0],
        manifest=manifest,
        names=list(map(str, numbers)),
        notes=tuple(notes),
    )


def _decoded(files: Sequence[Path], sums: dict[str, str] | None) -> Iterator[Images]:
    for file in files:
        yield decode(read_file(file, "picture") if sums is None else read_listed(file, sums, "picture"), file)


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
    manifest = read_manifest(path)
    sums = read_sums(path) if manifest is not None else None
    following: int | None = None
    shape: tuple[int, ...] = ()
    for file in files:
        first, last = shard_range(file)
        if following is not None and first > following:
            raise InputError(f"{path}: images {following} to {first - 1} are missing; run the same `sample` command again")
        if following is not None and first < following:
            raise InputError(f"{path}: {file.name} overlaps the shard before it; delete one of them")
        if not file.is_file():
            raise InputError(f"shard {file} is no regular file; delete it and sample again")
        try:
            with file.open("rb") as opened:
                shape, dtype = npy_header(opened)
        except READ_ERRORS as error:
            raise InputError(f"shard {file} cannot be read ({error}); delete it and sample again") from None
        if len(shape) != 4 or dtype != np.uint8 or shape[0] != last - first + 1:
            raise InputError(f"shard {file} does not hold the images that its name says; delete it and sample again")
        if shape[3] not in (1, 3):
            raise InputError(f"{path} holds images of {shape[3]} channels; pictures have 1 or 3")
        following = last + 1
    begin, end = shard_range(files[0])[0], shard_range(files[-1])[1] + 1
    chunks = partial(_read_shards, tuple(files), sums)
    return ImageSet(
        path,
        end - begin,
        (shape[1], shape[2]),
        chunks=chunks,
        first=begin,
        manifest=manifest or {},
        names=list(map(str, range(begin, end))),
    )


def _read_shards(files: Sequence[Path], sums: dict[str, str] | None) -> Iterator[Images]:
    for file in files:
        data = read_file(file, "shard") if sums is None else read_listed(file, sums, "shard")
        try:
            yield of_three_channels(read_npy(data))
        except READ_ERRORS as error:
            raise InputError(f"shard {file} cannot be read ({error}); delete it and sample again") from None


def _npz(path: Path) -> ImageSet:
    shapes = []
    try:
        with zipfile.ZipFile(path) as archive:
            for key in NPZ_KEYS:
                if f"{key}.npy" in archive.namelist():
                    with archive.open(f"{key}.npy") as file:
                        shape, dtype = npy_header(file, archive.getinfo(f"{key}.npy").file_size)
                    if dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3):
                        chunks = partial(_npz_chunks, path, f"{key}.npy")
                        return _with_origin(ImageSet(path, shape[0], shape[1:3], chunks=chunks))
                    shapes.append(f"{key} is {dtype} {shape}")
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read: {one_line(str(error))}") from None
    found = f"; {', '.join(shapes)}" if shapes else ""
    raise InputError(f"{path} has no uint8 array [N, H, W, 3] or [N, H, W, 1] named {' or '.join(NPZ_KEYS)}{found}")


def _with_origin(images: ImageSet) -> ImageSet:
    """The set with indices and manifest, where `sample` wrote it."""
    path = images.path
    found, _ = read_npz(path, ("indices", "manifest"), "images")
    if len(found) < 2:
        return images  # another tool's
    indices, text = found["indices"], found["manifest"]
    if text.dtype.kind != "U" or text.shape or indices.shape != (images.count,) or indices.dtype != np.int64:
        raise InputError(f"the manifest or the indices of {path} are damaged; {SAMPLE_AGAIN}")
    manifest = check_signed(parse_json(str(text), f"the manifest of {path}"), f"the manifest of {path}", SAMPLE_AGAIN)
    if manifest.pop(INDICES_DIGEST, None) != digest_of(indices.tobytes()):
        raise InputError(f"the indices of {path} were altered; {SAMPLE_AGAIN}")
    expected = manifest.pop(IMAGES_DIGEST, None)
    names = list(map(str, indices.tolist()))
    chunks = partial(_checked, images.chunks, expected, path)
    return ImageSet(
        path,
        images.count,
        images.shape,
        chunks=chunks,
        first=int(indices[0]) if names else None,
        manifest=manifest,
        names=names,
    )


def _checked(chunks: Callable[[], Iterator[Images]], expected: Any, path: Path) -> Iterator[Images]:
    """The chunks of an .npz of ours, whose digest is compared when the last one has been read."""
    digest = hashlib.sha256()
    for chunk in chunks():
        digest.update(chunk.tobytes())
        yield chunk
    if digest.hexdigest() != expected:
        raise InputError(f"the images of {path} were altered after they were written; {SAMPLE_AGAIN}")


def of_three_channels(images: Images) -> Images:
    """Grey images [N, H, W, 1] as RGB."""
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a set that `sample` made; None for a set of something else, whose file of that name is not ours. Raises
    InputError if it was altered."""
    file = folder / MANIFEST
    about = read_json(file, "manifest") if file.exists() else None
    if not isinstance(about, dict) or not (CONTENT in about or about.keys() >= OURS):
        if (folder / SUMS).exists() or (folder / SUMS).is_symlink():
            raise InputError(f"{folder} has a {SUMS} of `sample`, and its {MANIFEST} is gone or another; {SAMPLE_AGAIN}")
        return None
    return check_signed(about, f"manifest {file}", SAMPLE_AGAIN)


def same_manifest(found: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a manifest that was read is this one."""
    return signed(found) == signed(manifest)


def _npz_chunks(path: Path, member: str) -> Iterator[Images]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as opened:
            file = cast(BinaryIO, opened)
            shape, _ = npy_header(file, archive.getinfo(member).file_size)
            size = prod(shape[1:])
            for begin in range(0, shape[0], CHUNK):
                n = min(CHUNK, shape[0] - begin)
                data = file.read(n * size)
                if begin + n == shape[0]:
                    file.read(1)  # at the end the checksum is compared
                yield of_three_channels(np.frombuffer(data, np.uint8).reshape(n, *shape[1:]))
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read (truncated?): {one_line(str(error))}") from None


def cifar_batches(path: Path, prefix: str) -> Iterator[tuple[Images, Images]]:
    """(images [n, 32, 32, 3], labels [n]), uint8, of each file of CIFAR-10's binary archive whose name begins with `prefix`.
    Raises InputError if there is none, or the archive's checksum is wrong."""
    parts: dict[str, bytes] = {}
    try:
        # Read to its end, or the checksum there is never compared; and a link in an archive is not followed.
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                name = Path(member.name).name
                if name.startswith(prefix) and name.endswith(".bin"):
                    opened = archive.extractfile(member) if member.isreg() else None
                    parts[member.name] = opened.read() if opened is not None else b""
            while unpacked.read(1 << 20):
                pass
    except (*READ_ERRORS, tarfile.TarError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} cannot be read: {one_line(str(error))}") from None
    for name, data in sorted(parts.items()):
        if not data or len(data) % CIFAR_RECORD:
            raise InputError(f"{path}: {shown(name)} is no whole number of CIFAR-10 records; download the archive again")
        rows = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
        if (rows[:, 0] > 9).any():
            raise InputError(f"{path}: {shown(name)} has labels above 9; it is not CIFAR-10's binary version")
        yield rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    if not parts:
        raise InputError(f"{path} holds no {prefix}*.bin; the binary version of CIFAR-10 is needed (no pickle is read)")
