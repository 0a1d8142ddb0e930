"""What is shown while one waits: the rows that are tokenized; the training's steps, loss, rate and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES_WITHOUT_TERMINAL = 10


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


class TrainProgress:
    """A context manager around the steps; where there is no terminal it prints about ten plain lines instead."""

    def __init__(self, console: Console, num_steps: int, visible: bool, done: int = 0) -> None:
        self._console, self._num_steps, self._visible = console, num_steps, visible
        self._done = done
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("loss {task.fields[loss]:.4f}  rate {task.fields[rate]:.2e}  {task.fields[speed]:.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = self._bar.add_task(
            "train", total=num_steps, completed=done, loss=float("nan"), rate=0.0, speed=0.0
        )

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, loss: float, rate: float, speed: float) -> None:
        """One step is done. `loss` in nats a token, `speed` in tokens a second."""
        self._done += 1
        self._bar.update(self._task, advance=1, loss=loss, rate=rate, speed=speed)
        every = max(1, self._num_steps // LINES_WITHOUT_TERMINAL)
        last = self._done == self._num_steps
        if self._visible and not self._console.is_terminal and (self._done % every == 0 or last):
            line = f"step {self._done}/{self._num_steps}  loss {loss:.4f}  rate {rate:.2e}  {speed:.0f} tokens/s"
            self._console.print(line, highlight=False)
