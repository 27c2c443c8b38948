"""How much a command says, and where: `--quiet`, `--verbose` and `--log`."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modiff_trt.core.files import check_writable
from modiff_trt.core.progress import errors

PROJECT = logging.getLogger("modiff_trt")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What a bar on a terminal draws over itself with.
REDRAWN = ("\r", "\x1b[2K", "\x1b[1A")


class _Tee:
    """A stream whose finished lines are written to the log too."""

    def __init__(self, stream: Any, log: logging.Logger) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        written: int = self._stream.write(text)
        if not any(sign in text for sign in REDRAWN):
            *lines, self._line = (self._line + ESCAPES.sub("", text)).split("\n")
            for line in filter(str.strip, lines):
                self._log.debug("%s", line)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What a command says without options: lines of this project, and nothing of the libraries that it uses."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(logging.Formatter("%(message)s"))
    before = PROJECT.level, errors.quiet
    stream.setLevel(logging.INFO)
    PROJECT.addHandler(stream)
    PROJECT.setLevel(logging.INFO)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # those of libraries, which would stand above our own line
        try:
            yield
        finally:
            PROJECT.removeHandler(stream)
            PROJECT.setLevel(before[0])
            errors.quiet = before[1]


@contextlib.contextmanager
def said(*, quiet: bool, verbose: bool, log: Path | None) -> Iterator[None]:
    """Inside `plainly`: less, more, and into a file. Raises InputError for a file that cannot be written."""
    if quiet:
        errors.quiet = True
        for handler in PROJECT.handlers:
            handler.setLevel(logging.WARNING)
    if verbose:
        warnings.simplefilter("default")
        for handler in PROJECT.handlers:
            handler.setLevel(logging.DEBUG)
        PROJECT.setLevel(logging.DEBUG)
    if log is None:
        yield
        return
    check_writable(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(log, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    PROJECT.setLevel(logging.DEBUG)
    PROJECT.addHandler(file)
    # What is printed goes to the file alone: it has been seen already.
    printed = logging.Logger("printed", logging.DEBUG)
    printed.addHandler(file)
    printed.debug("modiff-trt %s", " ".join(sys.argv[1:]))
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tee(sys.stdout, printed), _Tee(sys.stderr, printed)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        PROJECT.removeHandler(file)
        file.close()
