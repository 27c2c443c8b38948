"""The program `modiff-trt`. Importing its parts takes a moment, in which it may be interrupted already."""

from __future__ import annotations

import sys

from modiff_trt.tools.stopping import GO_ON, INTERRUPTED, termination_as_interruption


def main() -> None:
    try:
        with termination_as_interruption():
            from modiff_trt.tools.cli.main import main as run
        run()
    except KeyboardInterrupt:
        print(GO_ON, file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
