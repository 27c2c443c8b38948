"""The one exception that a user is meant to read, and how errors of other libraries become one."""

from __future__ import annotations

import reprlib

# The longest value, and the longest line, that an error shows.
SHOWN, LINE = 80, 800
# What allocators say: Python's and numpy's own type, torch on a CPU and on CUDA, onnxruntime, oneDNN.
MEMORY_TYPES = ("OutOfMemoryError",)
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "bad allocation", "bad_alloc", "Failed to allocate memory")


class InputError(Exception):
    """Something the user gave (a file, an option, a machine) cannot be used.

    The message is one line: what is wrong, then what to do. The command line prints it and exits with code 2.
    """


def shown(value: object) -> str:
    """A value as an error shows it: on one line, never longer than SHOWN characters, whatever it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = SHOWN
    brief.maxlevel = 2
    try:
        text = brief.repr(value)
    except ValueError:  # an integer of more digits than Python turns into text
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def one_line(message: str) -> str:
    """A message on one line of at most LINE characters; of a longer one the middle is left out."""
    line = " ".join(message.split())
    half = LINE // 2
    return line if len(line) <= LINE else f"{line[:half]} [...] {line[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library here says that memory, of the host or of the GPU, is full."""
    named = isinstance(error, MemoryError) or type(error).__name__ in MEMORY_TYPES
    return named or any(words in str(error)[:2000] for words in MEMORY_WORDS)


def out_of_memory(what: str) -> InputError:
    """The one line for a full memory; `what` says what needed it and what would need less."""
    return InputError(f"the memory is full: {what}, or free the memory that other programs hold")
