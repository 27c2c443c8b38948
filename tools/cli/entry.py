"""The program `modiff-trt`. Importing its parts takes a moment, in which it may be interrupted already."""

from __future__ import annotations

import sys

from modiff_trt.tools.stopping import drop_odd_sizes, interrupted, termination_as_interruption


def main() -> None:
    drop_odd_sizes()
    try:
        with termination_as_interruption():
            from modiff_trt.tools.cli.main import main as run
        run()
    except KeyboardInterrupt:
        sys.exit(interrupted(lambda line: print(line, file=sys.stderr)))  # noqa: T201


if __name__ == "__main__":
    main()
