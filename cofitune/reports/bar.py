"""The progress bar of everything that takes long."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A context manager around a progress bar, whose last columns are the time that passed and the time left."""

    def __init__(self, console: Console, *columns: ProgressColumn, visible: bool = True) -> None:
        """`visible`: whether a terminal shows it."""
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self._bar = Progress(*columns, *times, console=console, disable=not (visible and console.is_terminal))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
