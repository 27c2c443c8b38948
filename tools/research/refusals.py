"""How the scripts of this folder say what is wrong: one line, exit code 2, as the command line does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from modiff_trt.core.errors import InputError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def refuses_bad_input(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turns an InputError of a script's `main` into its line and exit code 2."""

    @functools.wraps(main)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return main(*arguments, **options)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return run
