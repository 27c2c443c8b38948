"""Progress bars with rate and time left, on standard error, silent when it is not a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = str(task.fields.get("unit", "it"))
        return Text(f"{speed:.2f} {unit}/s" if speed else f"- {unit}/s", style="dim")


def progress_bar() -> Progress:
    """A bar; add tasks with a `unit` field."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=errors, disable=not errors.is_terminal)
