"""The evaluation's progress bar: which model, which task, items done, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class EvalProgress:
    """A context manager around one model's tasks; without a terminal it is silent, and a line a task tells all."""

    def __init__(self, console: Console, model: str, items: int) -> None:
        """Count up to `items`, those of all tasks together."""
        self._before, self._task_items = 0, 0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            TextColumn("items"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._model = model
        self._task = self._bar.add_task(model, total=items)

    def __enter__(self) -> EvalProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

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
