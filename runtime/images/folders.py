"""Images out: uint8 conversion, folders that can be resumed, NPZ files, and PSNR. No torch."""

from __future__ import annotations

import contextlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from modiff_trt.core.config import Config
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import (
    atomic_path,
    digest_of,
    lock_file,
    locked,
    remove_leftovers,
    signed,
    unwritable,
    write_signed,
)
from modiff_trt.core.manifest import MANIFEST
from modiff_trt.runtime.images.digest_list import SUMS, append_sums, read_listed, read_sums
from modiff_trt.runtime.images.sets import (
    IMAGES_DIGEST,
    INDICES_DIGEST,
    SHARDS,
    of_three_channels,
    read_manifest,
    same_manifest,
    shard_name,
    shard_range,
)

Float32 = np.ndarray[Any, np.dtype[np.float32]]
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]


def to_uint8(samples: Float32) -> UInt8:
    """float [N, C, H, W] in [-1, 1] (clipped) to uint8 [N, H, W, C]."""
    levels: UInt8 = np.rint((np.clip(samples, -1, 1) + 1) * 127.5).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def psnr(samples: Float32, reference: Float32) -> float:
    """Peak signal-to-noise ratio in dB of all images together, both clipped to [-1, 1]. Equal images give infinity."""
    error = np.clip(samples, -1, 1).astype(np.float64) - np.clip(reference, -1, 1)
    return decibels(float(np.mean(error**2)), 2.0)


def decibels(mean_square: float, peak: float) -> float:
    """The PSNR of a mean squared error where values span `peak`; infinity without an error."""
    return math.inf if mean_square == 0 else 10 * math.log10(peak**2 / mean_square)


def rounded_psnr(samples: Float32, reference: Float32, digits: int = 2) -> float | None:
    """`psnr` as a file holds it: that of equal images, which is infinite, is None."""
    found = psnr(samples, reference)
    return round(found, digits) if np.isfinite(found) else None


def save_npz(path: Path, samples: Float32, indices: Sequence[int], manifest: dict[str, Any]) -> None:
    """`samples` float32 NCHW before clipping, `images` uint8 NHWC, their `indices` int64, and the manifest as JSON text."""
    images, places = np.ascontiguousarray(to_uint8(samples)), np.asarray(indices, np.int64)
    digests = {IMAGES_DIGEST: digest_of(of_three_channels(images).tobytes()), INDICES_DIGEST: digest_of(places.tobytes())}
    text = np.asarray(json.dumps(signed(manifest | digests)))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, samples=samples, images=images, indices=places, manifest=text)


PICTURE_CHANNELS = (1, 3)


def makes_pictures(config: Config) -> bool:
    """Whether what a network makes can be looked at: no latents, and grey or coloured."""
    return not config.latent and config.input_shape[0] in PICTURE_CHANNELS


LOCK = ".lock"


class SetFolder(ABC):
    """A folder of images that one run, of one process or of many, writes, with the manifest of what made them.

    From the first moment until `close` the folder is claimed: processes with the same manifest share it, another run is
    refused. Images that are there and are as they were written are kept.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Raises InputError if the folder holds images that something else made, or another run is writing there now."""
        self.path = path
        self._new = not path.exists()
        self._held = contextlib.ExitStack()
        self._claimed = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            with locked(path):
                self._claim(manifest)
            self._sums = read_sums(path)
        except OSError as error:
            self.close()
            raise unwritable(path, error) from None
        except InputError:
            self.close()
            raise

    def _claim(self, manifest: dict[str, Any]) -> None:
        path, file = self.path, self.path / MANIFEST
        there = any(path.glob("*.png")) or any(path.glob(SHARDS))
        before = read_manifest(path)
        if before is not None and same_manifest(before, manifest):
            if self._held.enter_context(lock_file(path / LOCK, shared=True)) is None:
                raise InputError(f"another run is just beginning to write into {path}; run the command again")
        else:
            if there and before is None:
                raise InputError(f"{path} holds images without a {MANIFEST} of `sample`; choose another --out")
            if there:
                raise InputError(f"{path} holds images of another run (see its {MANIFEST}); choose another --out")
            if file.exists() and before is None:
                raise InputError(f"{file} is not of a set of images; choose another --out")
            with lock_file(path / LOCK, shared=False) as alone:
                if alone is None:
                    raise InputError(f"another run is writing into {path} now (see its {MANIFEST}); choose another --out")
                (path / SUMS).unlink(missing_ok=True)
                write_signed(file, manifest)
                self._claimed = True
            # Nobody comes between: whoever claims this folder holds its lock, as this process does here.
            self._held.enter_context(lock_file(path / LOCK, shared=True))
        self._tidy()

    def _tidy(self) -> None:
        """Deletes what killed processes left of writing here."""
        for name in (MANIFEST, SUMS, SHARDS, "[0-9]*.png"):
            remove_leftovers(self.path, name)

    def close(self) -> None:
        """Gives the folder back. Where no image was written it is as it was found."""
        empty = self._claimed and not any(self.path.glob("*.png")) and not any(self.path.glob(SHARDS))
        self._held.close()
        with contextlib.suppress(OSError), locked(self.path), lock_file(self.path / LOCK, shared=False) as alone:
            if alone is None:
                return
            (self.path / LOCK).unlink(missing_ok=True)
            if empty:
                for name in (MANIFEST, SUMS):
                    (self.path / name).unlink(missing_ok=True)
            if self._new:
                self.path.rmdir()  # which a folder that holds anything refuses

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tidy()  # once more: what was left just before this run began may have been another's, still being written
        self.close()

    def _is_written(self, file: Path) -> bool:
        """Whether a file is there, whole, and as it was written. One that is not listed was left by a killed run."""
        if not file.exists() or file.name not in self._sums:
            return False
        read_listed(file, self._sums, "image file")
        return True

    def _write(self, files: dict[Path, bytes]) -> None:
        for file, data in files.items():
            with atomic_path(file, tidy=False) as temporary:  # the folder is tidied once, not for each file
                temporary.write_bytes(data)
        digests = {file.name: digest_of(data) for file, data in files.items()}
        append_sums(self.path, digests)
        self._sums |= digests

    @abstractmethod
    def missing(self, indices: list[int]) -> list[int]:
        """Those of a batch's indices whose image is not there yet. Raises InputError for one that was altered."""

    @abstractmethod
    def save(self, indices: list[int], samples: Float32) -> None:
        """Writes those images of a batch that are not there."""


class ImageFolder(SetFolder):
    """PNG files named by image index."""

    def missing(self, indices: list[int]) -> list[int]:
        return [i for i in indices if not self._is_written(self._file(i))]

    def save(self, indices: list[int], samples: Float32) -> None:
        files = {}
        for index, image in zip(indices, to_uint8(samples), strict=True):
            if self._file(index).name not in self._sums or not self._file(index).exists():
                encoded = io.BytesIO()
                Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(encoded, format="PNG")
                files[self._file(index)] = encoded.getvalue()
        self._write(files)

    def _file(self, index: int) -> Path:
        return self.path / f"{index:05d}.png"


class ShardFolder(SetFolder):
    """One uint8 array [n, H, W, C] (.npy) a batch, named by its first and last image."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        super().__init__(path, manifest)
        # Other processes write other batches; what they add in the meantime does not matter to this one's.
        self._last: dict[int, int] = {}
        for first, last in sorted(map(shard_range, path.glob(SHARDS))):
            if first in self._last:  # a run that was killed between writing a longer shard and deleting the shorter
                (path / shard_name(first, self._last[first])).unlink(missing_ok=True)
            self._last[first] = last

    def missing(self, indices: list[int]) -> list[int]:
        """All of a batch, or none. Raises InputError too if a shard there is cut at other places."""
        first, last = indices[0], indices[-1]
        if self._last.get(first, -1) >= last and self._is_written(self.path / shard_name(first, self._last[first])):
            return []
        for begin, end in self._last.items():
            if begin != first and begin <= last and end >= first:
                raise InputError(
                    f"{self.path} has a shard of the images {begin} to {end}, which overlaps {first} to {last}; begin --seeds "
                    "where a shard begins, or choose another --out"
                )
        return indices

    def save(self, indices: list[int], samples: Float32) -> None:
        """Writes a batch as one shard; a shorter one that began with the same image, the last of a smaller run, goes."""
        first, last = indices[0], indices[-1]
        encoded = io.BytesIO()
        np.save(encoded, np.ascontiguousarray(to_uint8(samples)))
        self._write({self.path / shard_name(first, last): encoded.getvalue()})
        if first in self._last and self._last[first] < last:
            (self.path / shard_name(first, self._last[first])).unlink(missing_ok=True)
        self._last[first] = last
