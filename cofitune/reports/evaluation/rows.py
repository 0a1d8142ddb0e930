"""The table of an evaluation for a page: a row a category, task or summary, a cell a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cofitune.reports.evaluation.table import CATEGORIES, DRIFT, NOISE
from cofitune.reports.text import NONE, number, signed

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model in one row.

    Attributes:
        figure: the score, or of a loss its nats.
        raw: the share of right answers, where it is another figure.
        change, interval: against the base; empty for the base itself.
        verdict: better, worse, or nothing where the interval contains 0.
        chance: how probable such a change is by chance (McNemar, Holm), where that is told.
    """

    figure: str
    raw: str = ""
    change: str = ""
    interval: str = ""
    verdict: str = ""
    chance: str = ""


@dataclass(frozen=True)
class ScoreRow:
    """One row; `kind` is category, task or summary."""

    kind: str
    name: str
    metric: str
    items: str
    cells: tuple[Cell, ...]


def score_rows(scores: Entry) -> list[ScoreRow]:
    """The rows from top to bottom; their cells are in the order of `scores["models"]`."""
    rows = []
    for category in CATEGORIES:
        rows.append(ScoreRow("category", category, "", "", _cells(scores, category, None)))
        for title, about in scores["tasks"].items():
            if about["category"] == category:
                cells = _cells(scores, category, title)
                rows.append(ScoreRow("task", title, about["metric"], f"{about['items']:,}", cells))
    rows += [ScoreRow("summary", n, "", "", _cells(scores, n, None)) for n in ("versatility", "unified")]
    for title, about in scores["tasks"].items():
        if about["category"] == DRIFT:
            rows.append(ScoreRow("task", title, about["metric"], f"{about['items']:,}", _cells(scores, DRIFT, title)))
    return rows


def change_cell(change: Entry | None, higher_is_better: bool = True, digits: int = 1) -> Cell:
    """A change alone, without the score."""
    if change is None:
        return Cell(NONE)
    better, worse = ("better", "worse") if higher_is_better else ("worse", "better")
    return Cell(
        figure="",
        change=signed(change["value"], digits) + (NOISE if change["within_noise"] else ""),
        interval=f"{signed(change['low'], digits)} to {signed(change['high'], digits)}",
        verdict=better if change["low"] > 0 else worse if change["high"] < 0 else "",
        chance=_chance(change),
    )


def _cells(scores: Entry, name: str, title: str | None) -> tuple[Cell, ...]:
    base = next(iter(scores["models"]))
    against = {c["model"]: c for c in scores["comparisons"] if c["against"] == base}
    cells = []
    for model, own in scores["models"].items():
        figure, raw = _figures(scores, own, name, title)
        if model == base:
            cells.append(Cell(figure, raw))
            continue
        change = against[model]["tasks"][title] if title else against[model]["summary"][name]
        is_loss = title is not None and scores["tasks"][title]["unit"] != "share"
        higher = not is_loss or scores["tasks"][title]["higher_is_better"]
        message = change_cell(change, higher, 3 if is_loss else 1)
        cells.append(
            Cell(figure, raw, message.change or message.figure, message.interval, message.verdict, message.chance)
        )
    return tuple(cells)


def _figures(scores: Entry, own: Entry, name: str, title: str | None) -> tuple[str, str]:
    if title is None:
        return number(own["categories"][name] if name in own["categories"] else own[name]), ""
    task = own["tasks"][title]
    if scores["tasks"][title]["unit"] != "share":
        return number(task["raw"], 3), "nats" if scores["tasks"][title]["unit"] == "nats" else "own scale"
    return number(task["score"]), f"{100 * task['raw']:.1f} %"


def _chance(change: Entry) -> str:
    """McNemar's p where it tells a change or the interval does: the two need not agree."""
    p, excludes_0 = change.get("p_holm"), change["low"] > 0 or change["high"] < 0
    if p is None or not (p < 0.05 or excludes_0):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
