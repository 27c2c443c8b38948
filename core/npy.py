"""Arrays of numpy's files, read without trusting their headers: numpy's own reader raises nearly anything for damaged ones."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.errors import InputError, is_out_of_memory, one_line, shown
from modiff_trt.core.files import read_file

Array = np.ndarray[Any, Any]


def npy_header(file: Any, size: int | None = None) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of an .npy that is open at its beginning. Raises ValueError unless the file, of `size` bytes, has just
    what its header says."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:
        raise ValueError(f"its header is damaged ({one_line(str(error))[:100] or type(error).__name__})") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never executed")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its header says the shape {shown(shape)}")
    if fortran and len(shape) > 1:
        raise ValueError("its array is in Fortran order; save it with numpy.ascontiguousarray")
    if size is None:
        size = os.fstat(file.fileno()).st_size
    if file.tell() + prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its header says {dtype} {shown(shape)}, and the file has {size} bytes (truncated or damaged?)")
    return shape, dtype


def read_npy(data: bytes) -> Array:
    """The array of an .npy file's bytes. Raises ValueError."""
    file = io.BytesIO(data)
    shape, dtype = npy_header(file, len(data))
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def read_npz(path: Path, names: Sequence[str], what: str) -> tuple[dict[str, Array], bytes]:
    """Those of the arrays `names` that an .npz has, and the bytes of the file. Raises InputError."""
    data = read_file(path, what)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = set(archive.namelist())
            found = {name: read_npy(archive.read(f"{name}.npy")) for name in names if f"{name}.npy" in members}
    except Exception as error:  # zipfile raises nearly anything for damaged or encrypted archives
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what} {path} cannot be read: {one_line(str(error)) or type(error).__name__}") from None
    return found, data
