"""Reading image sets: a folder of pictures, an .npz of uint8 images, or CIFAR-10's binary archive."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modiff_trt.export.errors import InputError

Images = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
NPZ_KEYS = ("images", "arr_0")


def load_images(path: Path, size: int) -> Images:
    """uint8 [N, size, size, 3] from a folder, an .npz (`images`, or guided-diffusion's `arr_0`), or
    cifar-10-binary.tar.gz (its training batches). Raises InputError when nothing fits."""
    if path.is_dir():
        images = _from_folder(path)
    elif path.suffix == ".npz":
        images = _from_npz(path)
    elif path.name.endswith((".tar.gz", ".tgz")):
        images = _from_cifar_archive(path)
    else:
        raise InputError(
            f"images {path} not found or of unknown kind; pass a folder of pictures, an .npz or cifar-10-binary.tar.gz"
        )
    if images.shape[1:] != (size, size, 3):
        raise InputError(f"{path} holds images of shape {images.shape[1:]}, the model needs ({size}, {size}, 3)")
    return images


def _from_folder(path: Path) -> Images:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"folder {path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    try:
        arrays = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    except OSError as error:
        raise InputError(f"a picture in {path} cannot be read: {error}") from None
    if len({a.shape for a in arrays}) > 1:
        raise InputError(f"the pictures in {path} differ in size")
    return np.stack(arrays)


def _from_npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in NPZ_KEYS:
                if key in archive and archive[key].dtype == np.uint8 and archive[key].ndim == 4:
                    return np.asarray(archive[key])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    raise InputError(f"{path} has no uint8 array [N, H, W, 3] named {' or '.join(NPZ_KEYS)}")


def _from_cifar_archive(path: Path) -> Images:
    record = 1 + 3 * 32 * 32
    batches = []
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                if Path(member.name).name.startswith("data_batch") and member.name.endswith(".bin"):
                    file = archive.extractfile(member)
                    assert file is not None
                    rows = np.frombuffer(file.read(), np.uint8).reshape(-1, record)
                    batches.append(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not batches:
        raise InputError(f"{path} holds no data_batch_*.bin; the binary version of CIFAR-10 is needed (no pickle is read)")
    return np.concatenate(batches)
