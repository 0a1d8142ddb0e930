"""A comparison of methods for a page: sentences, and tables of text."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose

from cofitune.reports import html
from cofitune.reports.compare.content import MATCHED, SCORES, Comparison, Difference, Level, Point
from cofitune.reports.compare.table import draws_share, sentences
from cofitune.reports.html import Table
from cofitune.reports.text import NONE, number, signed


def comparison(content: Comparison) -> html.Comparison:
    """What the comparison found: what it can say, its methods, a table a matched level, and every point."""
    matched = [_matched(level, reference) for reference, level in content.levels]
    return html.Comparison(list(sentences(content)), [_methods(content), *matched, _points(content)])


def _methods(content: Comparison) -> Table:
    rows = []
    for method, about in content.methods.items():
        share = 100 * about.trained_weights / about.all_weights
        rates = dict.fromkeys(f"{point.learning_rate:g}" for point in content.of_method(method))
        rows.append([method, f"{about.trained_weights:,}", f"{share:.1f} %", f"{about.steps:,}", ", ".join(rates)])
    caption = (
        f"The methods, each at every alpha of {', '.join(f'{a:g}' for a in content.alphas)} (1: the run itself; "
        f"below, that share of what it trained) and seeds {', '.join(map(str, content.seeds))}."
    )
    return Table(caption, ["method", "trainable parameters", "of all", "steps", "learning rates"], rows)


def _matched(level: Level, reference: str) -> Table:
    rows = []
    for method, row in level.rows.items():
        if row.reason:
            rows.append([f"{method}\n{row.reason}", *[NONE] * 4])
            continue
        own = ((row.values[score], row.differences[score]) for score in MATCHED)
        rows.append([method, *(cell for value, change in own for cell in (number(value), _difference(change)))])
    caption = (
        f"At a speciality of {number(level.speciality)} ({level.why}): versatility, and instruction "
        f"following apart, on each method's own frontier, and the difference to {reference}'s with its 95 % "
        "interval, in points."
    )
    return Table(caption, ["method", "versatility", f"to {reference}", "instruct", f"to {reference}"], rows)


def _points(content: Comparison) -> Table:
    def row(method: str, rate: str, alpha: str, mark: str, scores: Mapping[str, float | None]) -> list[str]:
        return [method, rate, alpha, mark, *(number(scores[s]) for s in SCORES)]

    rows = [row("base", "", "0", "", content.base)]
    for point in content.points:
        mark = "yes" if point.on_frontier else f"no: {point.dominated_by or _equal_to(content, point)}"
        rows.append(row(point.method, f"{point.learning_rate:g}", f"{point.alpha:g}", mark, point.scores))
    caption = "Every point, means over the seeds: whether it is on its method's frontier, or which point is better."
    return Table(caption, ["method", "rate", "alpha", "on the frontier", *SCORES], rows, folded=True)


def _equal_to(content: Comparison, point: Point) -> str:
    """Of a point that none dominates and that is not on the frontier: which point there has the same scores."""

    def equals(other: str, score: str) -> bool:
        ours, theirs = point.scores[score], content.scores_of(other)[score]
        return ours is not None and theirs is not None and isclose(theirs, ours, abs_tol=1e-9)

    for other in content.frontiers[point.method]:
        if equals(other, "speciality") and equals(other, "versatility"):
            return f"as good as {other}"
    return "as good as another"


def _difference(result: Difference | None) -> str:
    if result is None:
        return ""
    if result.low is None:
        return f"{signed(result.value)}\nno interval: only {draws_share(result)} of the draws inside"
    part = "" if result.draws_inside == 1 else f", {draws_share(result)} of the draws inside"
    low, high = signed(result.low), signed(result.high)
    return f"{signed(result.value)}\n{low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high}{part}"
