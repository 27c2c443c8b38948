"""How a program of this project ends: its exit code, and the one line that it says where something went wrong. No torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from modiff_trt.core.errors import InputError, is_out_of_memory, one_line, out_of_memory

BAD_INPUT, INTERRUPTED = 2, 130
# A wider terminal than this there is none; Python refuses numbers of thousands of digits.
MOST_DIGITS = 5
GO_ON = "interrupted; run the same command again to go on"


def interrupted(say: Callable[[str], None]) -> int:
    """The exit code of an interrupted program, whose one line `say` gets."""
    say(GO_ON)
    # Python ends a process by the signal, whatever code it asks for, if the interruption passed through an `exec` of text (a
    # dataclass is made by one). It forgets this with the next `exec`.
    exec("")
    return INTERRUPTED


@contextmanager
def termination_as_interruption() -> Iterator[None]:
    """While it lasts, SIGTERM ends the program as Ctrl-C does: temporary files are removed on the way out."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def drop_odd_sizes() -> None:
    """Takes a terminal's size out of the environment where it is no number. The table library believes it."""
    for name in ("COLUMNS", "LINES"):
        given = os.environ.get(name, "1")
        if not (given.isascii() and given.isdecimal() and len(given) <= MOST_DIGITS):
            del os.environ[name]


def exit_code(run: Callable[[], int], say: Callable[[str], None]) -> int:
    """Runs a program and returns its exit code; `say` gets the line for anything that the user can mend. What is a fault of
    this program is raised."""
    drop_odd_sizes()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    with termination_as_interruption():
        try:
            code = run()
            sys.stdout.flush()
            return code
        except InputError as error:
            message = str(error)
        except KeyboardInterrupt:
            return interrupted(say)
        except BrokenPipeError:  # the reader of a pipe has gone
            _drop_output()
            return 1
        except OSError as error:
            if isinstance(error.filename, str):
                message = f"{error.filename}: {error.strerror}; choose another"
            elif error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                message = f"what this program prints cannot be written: {error.strerror}"
                _drop_output()
            else:
                raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = str(out_of_memory("pass a smaller --batch-size"))
    say(f"error: {one_line(message)}")
    return BAD_INPUT


def _drop_output() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at the end)
