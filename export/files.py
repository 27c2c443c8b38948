"""Reading and writing files: atomic writes, SHA-256, safetensors with a JSON header."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from modiff_trt.export.errors import InputError

HEADER_KEY = "modiff"
DIGEST = "sha256"
CACHE_VARIABLE = "MODIFF_TRT_CACHE"


def cache_folder() -> Path:
    """Where tuned convolutions and reference statistics are kept: $MODIFF_TRT_CACHE, or ~/.cache/modiff-trt. Raises InputError
    if there is neither."""
    named = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(named) if named else Path.home() / ".cache" / "modiff-trt"
    except RuntimeError:  # a user without a home
        raise InputError(f"there is no home folder for the cache; set {CACHE_VARIABLE} to a folder") from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, otherwise removed.

    Raises InputError when the folder cannot be written or the disk is full.
    """
    try:
        path = path.resolve() if path.is_symlink() else path
        special = path.exists() and {Path("/dev"), Path("/proc")} & set(path.parents)
        if path.is_dir() or special or (path.exists() and not path.is_file()):
            raise InputError(f"{path} exists and is not a file; choose another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    except SafetensorError as error:
        if "No space left" in str(error):
            raise unwritable(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask for the same folder waiting. Does nothing where the file system has no locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def unwritable(path: Path, error: OSError) -> InputError:
    if error.errno == errno.ENOSPC:
        return InputError(f"{path} was not written: the disk is full; free some space or choose another --output-dir")
    return InputError(f"{path} cannot be written: {error.strerror or error}; choose a folder that you may write to")


def remove_leftovers(folder: Path, name: str) -> None:
    """Deletes what killed processes left of writing files of a name, or a pattern; a file is written within the hour."""
    for left in folder.glob(f".{name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def check_writable(path: Path) -> None:
    """Raises InputError if a file could not be written at `path`, before work begins whose result goes there."""
    with contextlib.suppress(_Unwritten), atomic_path(path):
        raise _Unwritten


class _Unwritten(Exception):
    pass


def write_json(path: Path, data: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} is not readable JSON: {error}") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file. Raises InputError when it cannot be read."""
    return _digest(path, "sha256")


def md5(path: Path) -> str:
    """Hex MD5 of a file, for recognizing published checkpoints."""
    return _digest(path, "md5")


def _digest(path: Path, algorithm: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def save_arrays(path: Path, header: dict[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes a safetensors file whose metadata holds `header` as JSON. Atomic; a digest of header and arrays goes with it."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    header = json.loads(json.dumps(header))  # as it will be read: lists for tuples, and every key a string
    meta = {HEADER_KEY: json.dumps({**header, DIGEST: _content_digest(header, contiguous)})}
    remove_leftovers(path.parent, glob.escape(path.name))
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, meta)


def load_arrays(path: Path, kind: str, schema: int) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Reads what `save_arrays` wrote. Raises InputError if the file is missing, truncated, altered or of another kind."""
    if not path.exists():
        raise InputError(f"{kind} file {path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{kind} file {path} is not a valid safetensors file (truncated?): {error}") from None
    if HEADER_KEY not in meta:
        raise InputError(f"{path} is not a {kind} file: it has no '{HEADER_KEY}' header")
    try:
        header: dict[str, Any] = json.loads(meta[HEADER_KEY])
        found = (header["kind"], header["schema"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} has a damaged header; make the {kind} file again") from None
    if found[0] != kind:
        raise InputError(f"{path} is a {found[0]} file, but a {kind} file is needed here")
    if found[1] != schema:
        raise InputError(f"{path} has schema version {found[1]}, this program reads {schema}; make the {kind} file again")
    if DIGEST not in header:
        raise InputError(f"{path} was written by an earlier version; make the {kind} file again")
    if header.pop(DIGEST) != _content_digest(header, arrays):
        raise InputError(f"{kind} file {path} was altered: its content does not match the digest in its header; make it again")
    return header, arrays


def _content_digest(header: dict[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
