"""The table of an evaluation, for the terminal and for a page: a row a category, task or summary, a cell a model."""

from __future__ import annotations

from dataclasses import dataclass

from cofitune.reports.evaluation.scores import CATEGORIES, DRIFT, Change, Scores
from cofitune.reports.text import NONE, number, signed

NOISE = "~"  # after a change that another training seed alone could make


@dataclass(frozen=True)
class Cell:
    """One model in one row.

    Attributes:
        figure: the score, or of a loss its nats.
        share: of right answers, 0 to 1, where the figure is another.
        unit: of a figure that is no score.
        change, interval: against the base; empty for the base itself.
        verdict: better, worse, or nothing where the interval contains 0.
        chance: how probable such a change is by chance (McNemar, Holm), where that is told.
    """

    figure: str
    share: float | None = None
    unit: str = ""
    change: str = ""
    interval: str = ""
    verdict: str = ""
    chance: str = ""

    @property
    def raw(self) -> str:
        """What stands small below the figure."""
        return self.unit if self.share is None else f"{100 * self.share:.1f} %"


@dataclass(frozen=True)
class ScoreRow:
    """One row; `kind` is category, task or summary."""

    kind: str
    name: str
    metric: str
    items: str
    cells: tuple[Cell, ...]


def score_rows(scores: Scores) -> list[ScoreRow]:
    """The rows from top to bottom; their cells are in the order of the models."""

    def row(kind: str, name: str) -> ScoreRow:
        return ScoreRow(kind, name, "", "", tuple(_cell(scores, m, name, None) for m in scores.models))

    def tasks(category: str) -> list[ScoreRow]:
        return [
            ScoreRow(
                "task",
                title,
                scores.tasks[title].metric,
                f"{scores.tasks[title].items:,}",
                tuple(_cell(scores, m, category, title) for m in scores.models),
            )
            for title in scores.titles(category)
        ]

    rows = [r for category in CATEGORIES for r in (row("category", category), *tasks(category))]
    return [*rows, row("summary", "versatility"), row("summary", "unified"), *tasks(DRIFT)]


def change_cell(change: Change | None, higher_is_better: bool = True, digits: int = 1) -> Cell:
    """A change alone, without the score."""
    if change is None:
        return Cell("", change=NONE)
    verdicts = {0: "", 1: "better", -1: "worse"}
    return Cell(
        figure="",
        change=signed(change.value, digits) + (NOISE if change.within_noise else ""),
        interval=f"{signed(change.low, digits)} to {signed(change.high, digits)}",
        verdict=verdicts[change.sign if higher_is_better else -change.sign],
        chance=_chance(change),
    )


def _cell(scores: Scores, model: str, name: str, title: str | None) -> Cell:
    own = scores.models[model]
    task = scores.tasks[title] if title is not None else None
    share, unit = None, ""
    if title is None or task is None:
        figure = number(own.score(name))
    elif task.counted:
        figure, share = number(own.tasks[title].score), own.tasks[title].raw
    else:
        figure = number(own.tasks[title].raw, task.digits)
        unit = "nats" if task.unit == "nats" else "own scale"
    if model == scores.base:
        return Cell(figure, share, unit)
    higher, digits = (task.counted or task.higher_is_better, task.digits) if task else (True, 1)
    told = change_cell(scores.change(model, name, title), higher, digits)
    return Cell(figure, share, unit, told.change, told.interval, told.verdict, told.chance)


def _chance(change: Change) -> str:
    """McNemar's p where it tells a change or the interval does: the two need not agree."""
    p = change.p_holm
    if p is None or not (p < 0.05 or change.sign):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
