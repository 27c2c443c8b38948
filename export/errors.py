"""The one exception that a user is meant to read."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave (a file, an option, a machine) cannot be used.

    The message is one line: what is wrong, then what to do. The command line prints it and exits with code 2.
    """
