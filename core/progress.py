"""Progress with rate and time left, on standard error: a bar on a terminal, a line now and then in a file or a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

errors = Console(stderr=True, highlight=False, soft_wrap=True)
log = logging.getLogger(__name__)
# Seconds between the lines of a task where there is no bar.
LINE_EVERY = 30.0
T = TypeVar("T")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = str(task.fields.get("unit", "it"))
        return Text(f"{speed:.2f} {unit}/s" if speed else f"- {unit}/s", style="dim")


class _Told(Progress):
    """A bar that also tells how far it is, as lines to the log: `calibrate: 120 of 800 passes, 3.2 passes/s, 4 min left`."""

    def __init__(self, *columns: ProgressColumn, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self._begun: dict[TaskID, float] = {}
        self._told: dict[TaskID, float] = {}

    def add_task(self, *arguments: Any, **settings: Any) -> TaskID:
        task = super().add_task(*arguments, **settings)
        self._begun[task] = self._told[task] = time.monotonic()
        return task

    def track(
        self,
        sequence: Iterable[T],
        total: float | None = None,
        completed: int = 0,
        task_id: TaskID | None = None,
        description: str = "Working...",
        update_period: float = 0.1,
    ) -> Iterator[T]:
        if not self.disable:
            yield from super().track(sequence, total, completed, task_id, description, update_period)
            return
        # A bar that is not shown counts nothing between the first and the last.
        known = len(sequence) if total is None and isinstance(sequence, Sized) else total
        task = self.add_task(description, total=known, completed=completed) if task_id is None else task_id
        for item in sequence:
            yield item
            self.advance(task)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        now = time.monotonic()
        if not self._tasks[task_id].finished and now - self._told[task_id] >= LINE_EVERY:
            self._told[task_id] = now
            # Beside a bar they are for a log file alone.
            self._tell(self._tasks[task_id], now - self._begun[task_id], logging.INFO if self.disable else logging.DEBUG)

    def _tell(self, task: Task, seconds: float, level: int) -> None:
        unit, rate = str(task.fields.get("unit", "it")), task.completed / seconds
        left = "" if task.total is None or not rate else f", {duration((task.total - task.completed) / rate)} left"
        of = "" if task.total is None else f" of {task.total:.0f}"
        log.log(level, "%s: %.0f%s %s, %.3g %s/s%s", task.description, task.completed, of, unit, rate, unit, left)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_bar() -> Progress:
    """A bar; add tasks with a `unit` field."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return _Told(*columns, console=errors, disable=errors.quiet or not errors.is_terminal)
