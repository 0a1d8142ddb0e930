"""What is shown while one waits: the rows that are tokenized; the training's steps, figures and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from cofitune.reports.bar import Bar
from cofitune.reports.console import say
from cofitune.reports.text import clock

LINES_WITHOUT_TERMINAL = 10
SECONDS_BETWEEN_LINES = 60  # at most, so that a long training's log shows that it lives


@contextmanager
def show_tokenizing(console: Console) -> Iterator[Callable[[str, int], None]]:
    """Give a function that tells, on a terminal, of which source how many rows are done; it is gone afterwards."""
    status = console.status("")

    def on_rows(path: str, rows: int) -> None:
        if console.is_terminal:
            status.update(f"tokenizing {escape(path)}: {rows:,} rows")
            status.start()

    try:
        yield on_rows
    finally:
        status.stop()


class TrainProgress(Bar):
    """Around the steps.

    Where there is no terminal it prints plain lines instead: about ten over the whole training, or one a minute where
    that is more.
    """

    def __init__(self, console: Console, num_steps: int, visible: bool, done: int = 0) -> None:
        self._console, self._num_steps, self._visible = console, num_steps, visible
        self._done = self._done_before = done
        self._began = self._spoke = time.monotonic()
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24)
        super().__init__(console, *columns, TextColumn("{task.fields[figures]}"), visible=visible)
        self._task = self._bar.add_task("train", total=num_steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._began = self._spoke = time.monotonic()
        return super().__enter__()

    def advance(
        self, loss: float, rate: float, speed: float, mfu: float | None = None, rehearsal: float | None = None
    ) -> None:
        """One step is done. `loss` and `rehearsal` in nats a token, `speed` in tokens a second, `mfu` in [0, 1]."""
        self._done += 1
        beside = "" if rehearsal is None else f"  rehearsal {rehearsal:.4f}"
        figures = f"loss {loss:.4f}{beside}  lr {rate:.2e}  {speed:.0f} tokens/s"
        figures += "" if mfu is None else f"  MFU {mfu:.1%}"
        self._bar.update(self._task, advance=1, figures=figures)
        every = max(1, self._num_steps // LINES_WITHOUT_TERMINAL)
        due = self._done % every == 0 or time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES
        if self._visible and not self._console.is_terminal and (due or self._done == self._num_steps):
            self._spoke = time.monotonic()
            line = f"step {self._done}/{self._num_steps}  {figures}"
            if self._done < self._num_steps:
                seconds_a_step = (self._spoke - self._began) / (self._done - self._done_before)
                line += f"  {clock(seconds_a_step * (self._num_steps - self._done))} left"
            say(self._console, line)

    def say(self, line: str) -> None:
        """A line between the steps, above the bar."""
        if self._visible:
            say(self._bar.console, line)


class CountProgress(Bar):
    """Around things that are done one after the other, all of one kind.

    Where there is no terminal it prints about ten plain lines instead.
    """

    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console, self._what, self._total = console, what, total
        self._done = self._at_start = 0
        self._told = 0
        self._began: float | None = None
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
        super().__init__(console, *columns, visible=not console.quiet)
        self._task = self._bar.add_task(what, total=total)

    def advance(self, count: int) -> None:
        """`count` more are done; the first call counts those of an earlier process."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        if self._began is None:
            self._began, self._at_start, self._told = time.monotonic(), self._done, self._done
            return
        every = max(1, self._total // LINES_WITHOUT_TERMINAL)
        if self._console.is_terminal or (self._done - self._told < every and self._done < self._total):
            return
        self._told = self._done
        each = (time.monotonic() - self._began) / max(1, self._done - self._at_start)
        left = f"  {clock(each * (self._total - self._done))} left" if self._done < self._total else ""
        line = f"{self._what} {self._done:,}/{self._total:,}{left}"
        say(self._console, line)
