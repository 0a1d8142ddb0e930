"""The day on which a run began, which some templates write: kept in its folder, the same in all its processes."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

FILE = "day.txt"  # in a run's folder
VARIABLE = "COFITUNE_DAY"  # what a command hands its ranks and trials on, so that midnight does not part them


def today() -> str:
    """This process's day, as year-month-day: the one on which it, or the command that started it, first asked."""
    return os.environ.setdefault(VARIABLE, datetime.date.today().isoformat())


def read_day(run: Path) -> str | None:
    """The day on which the run began; None where it has not, or began under an older version."""
    try:
        text = (run / FILE).read_text(encoding="utf-8").strip()
        return datetime.date.fromisoformat(text).isoformat()
    except (OSError, ValueError):
        return None


def begin_day(run: Path) -> None:
    """Make the run's day this process's, and that of all processes that it starts; of a new run it is today."""
    os.environ[VARIABLE] = read_day(run) or today()


def keep_day(run: Path, day: str) -> None:
    """Write the run's day, unless one is there already."""
    try:
        with (run / FILE).open("x", encoding="utf-8") as file:
            file.write(f"{day}\n")
    except FileExistsError:
        pass
