"""The table of many models turned: a row a model, where a column a model does not fit the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cofitune.reports.console import plain_table
from cofitune.reports.evaluation.rows import ScoreRow, score_rows
from cofitune.reports.evaluation.scores import Scores
from cofitune.reports.evaluation.table import scores_table, stacked
from cofitune.reports.text import NONE

WIDEST = 1000  # columns, of a terminal that holds any table
HEADING = 12  # columns that a task's name may widen its column to; longer ones are broken
MODEL = 24  # likewise a model's


def scores_tables(scores: Scores, width: int) -> list[Table]:
    """The evaluation in tables that fit.

    Args:
        width: columns of the terminal.

    Returns:
        The one table with a column a model where that fits or there are two at most; else tables with a row a model:
        categories and summaries, then tasks, as many to a table as fit.
    """
    table = scores_table(scores)
    if len(scores.others) < 2 or _width(table) <= width:
        return [table]
    rows = [row for row in score_rows(scores) if any(cell.figure != NONE for cell in row.cells)]
    means, tasks = ([row for row in rows if (row.kind == "task") == is_task] for is_task in (False, True))
    title = f"0 is guessing, 100 all right; behind and below, the change against {scores.base} and its 95 % interval"
    return [*_turned(scores, means, width, title), *_turned(scores, tasks, width, "tasks")]


def _turned(scores: Scores, rows: Sequence[ScoreRow], width: int, title: str) -> Iterator[Table]:
    """As many tables as it takes; each has all models."""
    names = list(scores.models)
    room = width - min(MODEL, max(map(len, names))) - 1
    left = room
    table, columns = None, list[list[Text]]()
    for row in rows:
        cells = [stacked(cell) for cell in row.cells]
        own = max(min(HEADING, len(row.name)), *(len(line) for cell in cells for line in cell.plain.split("\n"))) + 1
        if table is None or own > left:
            if table is not None:
                yield _filled(table, names, columns)
            table, columns, left = _empty(title), [], room
            title = ""
        table.add_column(Text(row.name), justify="right", overflow="fold", width=own - 1)
        columns.append(cells)
        left -= own
    if table is not None:
        yield _filled(table, names, columns)


def _empty(title: str) -> Table:
    table = plain_table(title, title_style="", title_justify="left")
    table.add_column("model", overflow="fold", max_width=MODEL)
    return table


def _filled(table: Table, names: Sequence[str], columns: Sequence[Sequence[Text]]) -> Table:
    for name, *cells in zip(names, *columns, strict=True):
        table.add_row(Text(name), *cells)
    return table


def _width(table: Table) -> int:
    console = Console(width=WIDEST)
    return Measurement.get(console, console.options, table).maximum
