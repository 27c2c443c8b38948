"""The figures of a study: one JSON file, written after every figure, that an interrupted study goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import read_json, write_json


class Figures:
    """`data` is what the file says. No figure begins after `deadline` seconds."""

    def __init__(self, out: Path, settings: dict[str, Any], provenance: dict[str, Any], deadline: float) -> None:
        """Raises InputError where the file holds figures of other settings."""
        self.out, self._ends = out, time.monotonic() + deadline
        self.data: dict[str, Any] = read_json(out, "study") if out.exists() else {}
        differing = [name for name, value in settings.items() if self.data.get(name, value) != value]
        if differing:
            raise InputError(f"{out} holds figures of another {', '.join(differing)}; choose another --out")
        self.data |= settings | provenance

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() > self._ends

    def record(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        """Measures unless the file has it or time is up, and writes the file."""
        table = self.data.setdefault(part, {})
        if name in table or self.time_is_up:
            return
        value = measure()
        table[name] = None if value == float("-inf") else value
        self.write()
        typer.echo(f"{part}: {name}: {value}")

    def write(self) -> None:
        write_json(self.out, self.data)
