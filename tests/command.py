"""The program as its command line runs it, in this process."""

import os
import subprocess
import sys

import pytest

from modiff_trt.tools.cli.main import main


def run(*arguments) -> int:
    """The exit code of `modiff-trt` with these arguments."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return exit_.value.code


def alone(*arguments):
    """A command in a process of its own, as `subprocess.run` answers: Triton cannot compile where it interprets."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "modiff_trt.tools.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=clean,
    )
