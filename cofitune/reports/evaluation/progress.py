"""The evaluation's progress bar: which model, which task, items done, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from cofitune.reports.bar import Bar


class EvalProgress(Bar):
    """Around one model's tasks; without a terminal it is silent, and a line a task tells all."""

    def __init__(self, console: Console, model: str, items: int) -> None:
        """Count up to `items`, those of all tasks together."""
        self._before, self._task_items = 0, 0
        named = TextColumn("{task.description}", markup=False)
        columns = named, MofNCompleteColumn(), TextColumn("items"), BarColumn(bar_width=24)
        super().__init__(console, *columns, visible=not console.quiet)
        self._model = model
        self._task = self._bar.add_task(model, total=items)

    @property
    def done(self) -> int:
        """Items answered so far."""
        return int(self._bar.tasks[0].completed)

    def start(self, title: str, items: int) -> None:
        """The next task begins; the one before it is done."""
        self._before += self._task_items
        self._task_items = items
        self._bar.update(self._task, description=f"{self._model}: {title}", completed=self._before)

    def advance(self, requests: int, total: int) -> None:
        """So many of the task's requests are answered; an item with four choices has four."""
        self._bar.update(self._task, completed=self._before + self._task_items * requests // total)
