"""Reading and writing files: read once and hash the same bytes, atomic writes, JSON and safetensors that carry a digest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from modiff_trt.core.errors import InputError, one_line

HEADER_KEY = "modiff"
DIGEST = "sha256"
# Of a JSON object, in it.
CONTENT = "content_sha256"
MOST_DIGITS = 300
CACHE_VARIABLE = "MODIFF_TRT_CACHE"
PART = ".part"


def cache_folder() -> Path:
    """Where tuned convolutions and reference statistics are kept: $MODIFF_TRT_CACHE, or ~/.cache/modiff-trt. Raises InputError
    if there is neither."""
    named = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(named) if named else Path.home() / ".cache" / "modiff-trt"
    except RuntimeError:  # a user without a home
        raise InputError(f"there is no home folder for the cache; set {CACHE_VARIABLE} to a folder") from None


def read_file(path: Path, what: str) -> bytes:
    """All bytes of a regular file, read once: what is hashed is what is used, and a file that is overwritten meanwhile cannot
    take the process down, as one that is mapped into memory can. Raises InputError; `what` names the kind of file."""
    try:
        # A pipe that nobody writes to would be waited for without end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                kind = "a folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "no regular file"
                raise InputError(f"{what} {path} is {kind}; pass a file")
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{what} {path} is a folder; pass a file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise InputError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except MemoryError:
        raise InputError(f"{what} {path} is larger than this machine's memory") from None


def digest_of(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path, *, tidy: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, otherwise removed.

    With `tidy`, what killed processes left of writing this file goes first. That reads the whole folder: whoever writes many
    files into one calls `remove_leftovers` once instead. Raises InputError when the folder cannot be written or the disk is
    full.
    """
    try:
        path = path.resolve() if path.is_symlink() else path
        special = path.exists() and {Path("/proc"), Path("/sys")} & set(path.parents)
        if path.is_dir() or special or (path.exists() and not path.is_file()):
            raise InputError(f"{path} exists and is not a file; choose another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            remove_leftovers(path.parent, glob.escape(path.name))
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=PART, dir=path.parent)
    except RuntimeError:  # Python 3.11 and 3.12 on links that lead to one another
        raise InputError(f"{path} is a link that leads back to itself; choose another output") from None
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from None
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):  # whoever finds the file unlocked knows that its writer is gone
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        os.close(handle)


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


@contextlib.contextmanager
def lock_file(path: Path, *, shared: bool) -> Iterator[int | None]:
    """Holds a lock on `path`, which is made if it is not there, without waiting: yields the descriptor, or None where another
    process holds a lock that excludes this one. Where the file system has no locks it yields a descriptor all the same."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError:
            pass
        yield handle
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError | ValueError) -> InputError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{path} was not written: the disk is full; free some space or choose another --output-dir")
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path} cannot be written: {reason}; choose a folder that you may write to")


def remove_leftovers(folder: Path, name: str) -> None:
    """Deletes what killed processes left of writing files of a name, or a pattern: those that nobody holds a lock on, and where
    the file system has no locks, those of an hour ago."""
    for left in folder.glob(f".{name}.*{PART}"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                # A file is there for an instant before its writer has locked it.
                old = time.time() - left.stat().st_mtime > 2
            except BlockingIOError:
                old = False
            except OSError:
                old = time.time() - left.stat().st_mtime > 3600
            if old:
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
    """A JSON file whose numbers are finite. Raises InputError."""
    return parse_json(read_file(path, what), f"{what} {path}")


def parse_json(data: bytes | str, source: str) -> Any:
    """JSON whose numbers are finite: NaN, infinities and integers of hundreds of digits, which Python's reader takes, are
    refused. Raises InputError; `source` says where the text is from."""

    def refuse(text: str) -> Any:
        raise ValueError(f"{text[:20]} is no number that can be used here")

    def whole(text: str) -> int:
        return int(text) if len(text) <= MOST_DIGITS else refuse(text)

    def real(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse(text)

    try:
        return json.loads(data, parse_constant=refuse, parse_int=whole, parse_float=real)
    except RecursionError:
        raise InputError(f"{source} is not readable JSON: it is nested too deeply") from None
    except (ValueError, MemoryError) as error:
        raise InputError(f"{source} is not readable JSON: {one_line(str(error))}") from None


def write_signed(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object with a digest of its content in it."""
    write_json(path, signed(data))


def signed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The object as it is read back from JSON, with a digest of its content."""
    plain: dict[str, Any] = json.loads(json.dumps({key: value for key, value in data.items() if key != CONTENT}))
    return {**plain, CONTENT: _json_digest(plain)}


def read_signed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object that `write_signed` wrote, without its digest. Raises InputError if it was altered since; `remedy` says what
    to do then."""
    return check_signed(read_json(path, what), f"{what} {path}", remedy)


def check_signed(data: Any, source: str, remedy: str) -> dict[str, Any]:
    """The object that `signed` made, without its digest. Raises InputError if it was altered since."""
    if not isinstance(data, dict):
        raise InputError(f"{source} is not a JSON object; {remedy}")
    if CONTENT not in data:
        raise InputError(f"{source} carries no digest: another program or an earlier version wrote it; {remedy}")
    rest = {key: value for key, value in data.items() if key != CONTENT}
    if data[CONTENT] != _json_digest(rest):
        raise InputError(f"{source} was altered after it was written; {remedy}")
    return rest


def read_result(path: Path, what: str) -> Any:
    """A JSON file of figures, without its digest. Raises InputError if it was altered since it was written; files of earlier
    versions have no digest."""
    data = read_json(path, what)
    signs = isinstance(data, dict) and CONTENT in data
    return check_signed(data, f"{what} {path}", "measure again, into another file") if signs else data


def _json_digest(data: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(data, sort_keys=True).encode())


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file that is only recorded; one that is also used is read with `read_file` and hashed with `digest_of`.
    Raises InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def save_arrays(path: Path, header: dict[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes a safetensors file whose metadata holds `header` as JSON. Atomic; a digest of header and arrays goes with it."""
    header, contiguous = _as_read(header), _contiguous(arrays)
    meta = {HEADER_KEY: json.dumps({**header, DIGEST: _content_digest(header, contiguous)})}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, meta)


def arrays_digest(header: dict[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 of what `save_arrays` would write."""
    return _content_digest(_as_read(header), _contiguous(arrays))


def kept_arrays(path: Path, header: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What an interrupted job left with `save_arrays` under the same header; nothing where there is no such file, or it is of
    another job. `header` has the file's kind and schema."""
    if not path.exists():
        return {}
    try:
        stored = load_arrays(path, header["kind"], header["schema"])
    except InputError:
        return {}
    return stored.arrays if stored.header == _as_read(header) else {}


def _as_read(header: dict[str, Any]) -> dict[str, Any]:
    """A header as it will be read: lists for tuples, and every key a string."""
    found: dict[str, Any] = json.loads(json.dumps(header))
    return found


def _contiguous(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}


class Stored(NamedTuple):
    """What a file of `save_arrays` holds: its header, its arrays, and the SHA-256 of the file."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    sha256: str


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file; empty where it has none. Raises ValueError where its header is not one."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return found if isinstance(found, dict) else {}


def load_arrays(path: Path, kind: str, schema: int, older: tuple[int, ...] = ()) -> Stored:
    """Reads what `save_arrays` wrote, in this schema or an `older` one. Raises InputError if the file is missing, truncated,
    altered or of another kind."""
    data = read_file(path, f"{kind} file")
    try:
        meta, arrays = safetensors_metadata(data), load(data)
    except Exception as error:  # the reader raises nearly anything for damaged bytes
        raise InputError(f"{kind} file {path} is not a valid safetensors file (truncated?): {one_line(str(error))}") from None
    if not isinstance(meta.get(HEADER_KEY), str):
        raise InputError(f"{path} is not a {kind} file: it has no '{HEADER_KEY}' header")
    header: dict[str, Any] = parse_json(meta[HEADER_KEY], f"the header of {kind} file {path}")
    if not isinstance(header, dict) or not {"kind", "schema"} <= header.keys():
        raise InputError(f"{path} has a damaged header; make the {kind} file again")
    if header["kind"] != kind:
        raise InputError(f"{path} is a {one_line(str(header['kind']))} file, but a {kind} file is needed here")
    if header["schema"] not in (schema, *older):
        raise InputError(
            f"{path} has schema version {header['schema']}, this program reads {schema}; make the {kind} file again"
        )
    if DIGEST not in header:
        raise InputError(f"{path} was written by an earlier version; make the {kind} file again")
    if header.pop(DIGEST) != _content_digest(header, arrays):
        raise InputError(f"{kind} file {path} was altered: its content does not match the digest in its header; make it again")
    return Stored(header, arrays, digest_of(data))


def _content_digest(header: dict[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
