"""Which TensorRT is there: stock TensorRT (`tensorrt`), its lean runtime, which builds nothing (`tensorrt_lean`), or
TensorRT-RTX (`tensorrt_rtx`), behind one name."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff_trt.core.errors import InputError
from modiff_trt.core.extras import install_command

BUILDERS = ("tensorrt", "rtx")
PACKAGES = {"tensorrt": "tensorrt", "lean": "tensorrt_lean", "rtx": "tensorrt_rtx"}
RUNTIMES = ("auto", *PACKAGES)
INSTALL = {name: install_command(extra) for name, extra in zip(PACKAGES, ("trt", "lean", "rtx"), strict=True)}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT: `name` is `tensorrt`, `lean` or `rtx`, `trt` the module, whose API they share as far as it goes."""

    name: str
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.name == "rtx"


def builder(runtime: str = "auto") -> Library:
    """A TensorRT that builds; `auto` takes stock TensorRT where it is installed, else TensorRT-RTX. Raises InputError."""
    check_runtime(runtime)
    if runtime == "lean":
        raise InputError(
            "the lean runtime builds nothing; build with --runtime tensorrt --version-compatible, sample with lean"
        )
    return open_library(*(BUILDERS if runtime == "auto" else (runtime,)))


def check_runtime(runtime: str) -> None:
    """Raises InputError for what is no --runtime."""
    if runtime not in RUNTIMES:
        raise InputError(f"--runtime must be one of {', '.join(RUNTIMES)}, found '{runtime}'")


def is_installed(name: str) -> bool:
    """Whether there is a TensorRT of this name; nothing is imported."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def check_parser(library: Library) -> None:
    """Raises InputError where TensorRT's parser would end this process at the first plugin."""
    if library.is_rtx and not _load_rtx_libraries():
        raise InputError(
            "tensorrt_rtx was imported before modiff_trt, whose plugin it then cannot find; import modiff_trt first"
        )


def open_library(*names: str) -> Library:
    """Imports the first of these TensorRTs that is installed.

    Raises InputError when none is, or its libraries do not load.
    """
    installed = [name for name in names if is_installed(name)]
    if not installed:
        raise InputError(f"no TensorRT is installed; {' or '.join(INSTALL[name] for name in names)}")
    name = installed[0]
    if name == "rtx":
        _load_rtx_libraries()
    try:
        return Library(name, importlib.import_module(PACKAGES[name]))
    except (ImportError, OSError) as error:
        raise InputError(f"the package {PACKAGES[name]} does not load ({error}); reinstall it: {INSTALL[name]}") from None


@functools.cache
def _load_rtx_libraries() -> bool:
    """Loads TensorRT-RTX's libraries from a folder in which they also have their unversioned names.

    Its ONNX parser looks for `libtensorrt_rtx.so` beside itself as soon as a file has a plugin node, and aborts the process if
    that is missing; the wheel has `libtensorrt_rtx.so.1` alone. The links stand in a temporary folder: a user's packages are
    left as they are. Without the wheel's libraries there is nothing to do. False where it is too late: the package was imported
    before.
    """
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        return True
    if "tensorrt_rtx_bindings" in sys.modules:
        return False
    links = Path(tempfile.mkdtemp(prefix="modiff-trt-rtx-"))
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    # The core library first: the parser depends on it.
    libraries = sorted(Path(found.origin).parent.glob("*.so.*"), key=lambda path: len(path.name))
    for library in libraries:
        (links / library.name).symlink_to(library)
        (links / library.name.split(".so.")[0]).with_suffix(".so").symlink_to(library)
    for library in libraries:
        with contextlib.suppress(OSError):  # what cannot be loaded is reported by the import that follows
            ctypes.CDLL(str(links / library.name), mode=ctypes.RTLD_GLOBAL)
    return True
