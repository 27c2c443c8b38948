"""Starting noise: image `i` of seed `S` has its own generator, so that batches and ranks never change an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.errors import InputError, one_line, shown
from modiff_trt.core.files import digest_of, read_file
from modiff_trt.core.npy import read_npy

Array = np.ndarray[Any, np.dtype[np.float32]]


class ImageNoise:
    """Standard normal noise for a list of images. The first draw is x_T; each later one is a step's fresh noise."""

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> None:
        self._generators = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in indices]
        self._shape = shape

    def draw(self) -> Array:
        """float32 [N, C, H, W]."""
        return np.stack([g.standard_normal(self._shape, dtype=np.float32) for g in self._generators])


def load_noise(path: Path, count: int, shape: tuple[int, int, int]) -> tuple[Array, str]:
    """x_T for `count` images from a .npy file, float32 [N, C, H, W] with N >= count, and the SHA-256 of the file."""
    if not path.exists():
        raise InputError(f"noise file {path} does not exist")
    data = read_file(path, "noise file")
    try:
        noise = read_npy(data)
    except ValueError as error:
        raise InputError(f"noise file {path} is not a valid .npy file: {one_line(str(error))}") from None
    if noise.dtype != np.float32 or noise.shape[1:] != shape or len(noise) < count:
        found = f"{noise.dtype} {shown(noise.shape)}"
        raise InputError(f"noise file {path} must be float32 {('N', *shape)} with N >= {count}, found {found}")
    if not np.isfinite(noise).all():
        raise InputError(f"noise file {path} holds NaN or infinite values")
    return np.asarray(noise[:count]), digest_of(data)
