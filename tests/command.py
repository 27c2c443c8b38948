"""The program as its command line runs it, in this process."""

import pytest

from modiff_trt.tools.cli.main import main


def run(*arguments) -> int:
    """The exit code of `modiff-trt` with these arguments."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return exit_.value.code
