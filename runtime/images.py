"""Images out: uint8 conversion, folders that can be resumed, NPZ files, and PSNR. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import atomic_path, read_json, remove_leftovers, write_json
from modiff_trt.export.manifest import MANIFEST
from modiff_trt.runtime.image_sets import SHARDS, shard_name, shard_range

Float32 = np.ndarray[Any, np.dtype[np.float32]]
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]


def to_uint8(samples: Float32) -> UInt8:
    """float [N, C, H, W] in [-1, 1] (clipped) to uint8 [N, H, W, C]."""
    levels: UInt8 = np.rint((np.clip(samples, -1, 1) + 1) * 127.5).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def psnr(samples: Float32, reference: Float32) -> float:
    """Peak signal-to-noise ratio in dB of all images together, both clipped to [-1, 1]. Equal images give infinity."""
    error = np.clip(samples, -1, 1).astype(np.float64) - np.clip(reference, -1, 1)
    mse = float(np.mean(error**2)) / 4
    return math.inf if mse == 0 else -10 * math.log10(mse)


def save_npz(path: Path, samples: Float32, indices: Sequence[int], manifest: dict[str, Any]) -> None:
    """`samples` float32 NCHW before clipping, `images` uint8 NHWC, their `indices` int64, and the manifest as JSON text."""
    places, text = np.asarray(indices, np.int64), np.asarray(json.dumps(manifest))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, samples=samples, images=to_uint8(samples), indices=places, manifest=text)


# What every manifest of a set of images has.
OURS = {"seed", "eta", "batch_size"}


def _claim(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest into a new folder. Raises InputError if the folder holds images that something else made."""
    file = path / MANIFEST
    before = read_json(file, "manifest") if file.exists() else None
    if any(path.glob("*.png")) or any(path.glob(SHARDS)):
        if before is None:
            raise InputError(f"{path} holds images without a {MANIFEST}; choose another --out")
        if before != manifest:
            raise InputError(f"{path} holds images of another run (see its {MANIFEST}); choose another --out")
    elif before is not None and before != manifest and not (isinstance(before, dict) and before.keys() >= OURS):
        raise InputError(f"{file} is not of a set of images; choose another --out")
    if before != manifest:  # there is none, or one of a run that came to nothing; ranks that begin together write the same one
        write_json(file, manifest)
    for name in (MANIFEST, SHARDS, "[0-9]*.png"):
        remove_leftovers(path, name)


class ImageFolder:
    """A folder of PNG files named by image index, with the manifest of what made them. Existing images are kept."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Raises InputError if the folder holds images that something else made."""
        self.path = path
        _claim(path, manifest)

    def missing(self, indices: list[int]) -> list[int]:
        """The indices whose image does not exist yet."""
        return [i for i in indices if not self._file(i).exists()]

    def save(self, indices: list[int], samples: Float32) -> None:
        """Writes the images that are not there."""
        for index, image in zip(indices, to_uint8(samples), strict=True):
            if self._file(index).exists():
                continue
            with atomic_path(self._file(index)) as temporary:
                Image.fromarray(image.squeeze()).save(temporary, format="PNG")

    def _file(self, index: int) -> Path:
        return self.path / f"{index:05d}.png"


class ShardFolder:
    """A folder with one uint8 array [n, H, W, C] (.npy) a batch, named by its first and last image, and the manifest."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Raises InputError if the folder holds images that something else made."""
        self.path = path
        _claim(path, manifest)
        # Other processes write other batches; what they add in the meantime does not matter to this one's.
        self._last: dict[int, int] = {}
        for first, last in sorted(map(shard_range, path.glob(SHARDS))):
            if first in self._last:  # a run that was killed between writing a longer shard and deleting the shorter
                (path / shard_name(first, self._last[first])).unlink(missing_ok=True)
            self._last[first] = last

    def missing(self, indices: list[int]) -> list[int]:
        """All of a batch, or none. Raises InputError if a shard there is cut at other places."""
        first, last = indices[0], indices[-1]
        if self._last.get(first, -1) >= last:
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
        with atomic_path(self.path / shard_name(first, last)) as temporary, temporary.open("wb") as file:
            np.save(file, np.ascontiguousarray(to_uint8(samples)))
        if first in self._last and self._last[first] < last:
            (self.path / shard_name(first, self._last[first])).unlink(missing_ok=True)
        self._last[first] = last
