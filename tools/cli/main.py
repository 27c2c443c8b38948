"""The command line: `modiff-trt <stage>`. Heavy imports happen inside the stages, so that --help is instant."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.progress import errors
from modiff_trt.tools.cli import (
    bench,
    calibrate,
    collect,
    demo,
    engine,
    engines,
    evaluate,
    export,
    inspect_scales,
    quantize,
    report,
    sample,
)
from modiff_trt.tools.cli.panels import grouped
from modiff_trt.tools.stopping import BAD_INPUT, INTERRUPTED, exit_code

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    # The research code spells options with underscores; both spellings work.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"modiff-trt {version('modiff-trt')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Calibrate, export and deploy INT8 diffusion UNets with MoDiff state kept on the device."""


STAGES = (
    demo.demo,
    quantize.quantize,
    collect.collect,
    calibrate.calibrate,
    inspect_scales.inspect,
    export.export,
    sample.sample,
    evaluate.evaluate,
    bench.bench,
    report.report,
    engine.build,
    engine.verify,
    engines.engines,
    engine.package,
)
for stage in STAGES:
    app.command()(grouped(stage))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line on standard error and exit code 2 for anything the user can mend."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of libraries, which would stand above our own line
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modiff_trt").setLevel(logging.INFO)
    sys.exit(exit_code(lambda: _run(arguments), lambda line: errors.print(line, markup=False)))


def _run(arguments: list[str] | None) -> int:
    try:
        result: Any = app(args=arguments, standalone_mode=False)
    except Exception as error:
        # Usage errors of the command-line library; its base class has no stable public name.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # no arguments at all: the help has been printed
            return BAD_INPUT
        message = error.format_message().replace("Value error, ", "").rstrip(".")  # some versions say both
        raise InputError(f"{message}; see --help") from None
    if result == INTERRUPTED:  # the command-line library has turned Ctrl-C into this
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
