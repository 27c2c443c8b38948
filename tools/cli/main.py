"""The command line: `modiff-trt <stage>`. Heavy imports happen inside the stages, so that --help is instant."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
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
from modiff_trt.tools.cli.panels import EXAMPLES, grouped
from modiff_trt.tools.cli.saying import plainly, said
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_show_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no remarks: results and errors")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="what the libraries warn of too")] = False,
    log: Annotated[
        Path | None, typer.Option(help="file to add what is said to, with times, and how far long stages are")
    ] = None,
) -> None:
    """Calibrate, export and deploy INT8 diffusion UNets with MoDiff state kept on the device."""
    if quiet and verbose:
        raise InputError("--quiet and --verbose exclude each other")
    saying = said(quiet=quiet, verbose=verbose, log=log)
    if context.obj is None:  # not by `main`, whose stack lasts until an error has been said
        context.with_resource(saying)
    else:
        context.obj.enter_context(saying)


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
    app.command(epilog=f"Example: modiff-trt {stage.__name__} {EXAMPLES[stage.__name__]}")(grouped(stage))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line on standard error and exit code 2 for anything the user can mend."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(plainly())
        code = exit_code(lambda: _run(arguments, stack), _say)
    sys.exit(code)


def _say(line: str) -> None:
    """An error, which `--quiet` does not hide."""
    errors.quiet = False
    errors.print(line, markup=False)


def _run(arguments: list[str] | None, stack: contextlib.ExitStack) -> int:
    try:
        result: Any = app(args=arguments, standalone_mode=False, obj=stack)
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
