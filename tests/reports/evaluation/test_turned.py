"""The table of many models in a narrow terminal: no word and no figure is broken, and nothing is left out."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from cofitune.reports.evaluation.scores import Scores
from cofitune.reports.evaluation.turned import scores_tables
from tests.reports.evaluation.test_table import BASE_AND_RUN, TASKS, make_scores

NINE = {"base": [0.05, 0.55, 0.4], **{f"method-{n}": [0.5, 0.5 + 0.02 * n, 0.3] for n in range(8)}}


def lines(scores: Scores, width: int) -> list[str]:
    out = StringIO()
    console = Console(file=out, width=width, no_color=True)
    for table in scores_tables(scores, width):
        console.print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_nine_models_are_rows_in_80_columns() -> None:
    scores = Scores.of(make_scores(NINE))
    shown = lines(scores, 80)
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    for name in (*NINE, *TASKS, "speciality", "gen_kn", "gen_rs", "versatility", "unified"):
        assert name in text
    first = next(line for line in shown if "method-7" in line)
    assert first.split()[1:3] == ["50.0", "+45.0"], "the first mean, and its change against the base"


def test_what_fits_and_two_models_stay_as_they_are() -> None:
    assert len(scores_tables(Scores.of(make_scores(NINE)), 300)) == 1
    two = Scores.of(make_scores(BASE_AND_RUN))
    (table,) = scores_tables(two, 20)
    assert [str(column.header) for column in table.columns][:3] == ["task", "items", "base"]
