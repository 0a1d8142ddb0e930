"""A comparison of methods for a page: sentences, tables, and the frontiers. Reads what `compare.json` holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isclose
from typing import Any

from cofitune.reports.compare.table import CATEGORIES, draws_share, sentences
from cofitune.reports.html import Comparison, Table
from cofitune.reports.text import NONE, number, signed

Entry = Mapping[str, Any]
FORMAT = 1  # of compare.json
SCORES = ("speciality", "versatility", *CATEGORIES)


def comparison(content: Entry) -> Comparison:
    """What the comparison found: what it can say, its methods, a table a matched level, and every point."""
    return Comparison(list(sentences(content)), [_methods(content), *_matched(content), _points(content)])


def _methods(content: Entry) -> Table:
    rows = []
    for method, about in content["methods"].items():
        share = 100 * about["trained_weights"] / about["all_weights"]
        rates = dict.fromkeys(f"{p['learning_rate']:g}" for p in content["points"] if p["method"] == method)
        rows.append(
            [method, f"{about['trained_weights']:,}", f"{share:.1f} %", f"{about['steps']:,}", ", ".join(rates)]
        )
    caption = (
        f"The methods, each at every alpha of {', '.join(f'{a:g}' for a in content['alphas'])} (1: the run itself; "
        f"below, that share of what it trained) and seeds {', '.join(map(str, content['seeds']))}."
    )
    return Table(caption, ["method", "trained weights", "of all", "steps", "learning rates"], rows)


def _matched(content: Entry) -> Iterator[Table]:
    yield from _held_against(content["reference"], content["matched"])
    for held in content.get("against_controls", ()):
        yield from _held_against(held["control"], held["matched"])


def _held_against(reference: str, levels: Iterable[Entry]) -> Iterator[Table]:
    head = ["method", "versatility", f"to {reference}", "instruct", f"to {reference}"]
    for level in levels:
        rows = []
        for method, row in level["rows"].items():
            if row["reason"]:
                rows.append([f"{method}\n{row['reason']}", *[NONE] * 4])
                continue
            own = ((row.get(s), row.get(f"{s}_against_reference")) for s in ("versatility", "instruct"))
            rows.append([method, *(cell for value, change in own for cell in (number(value), _difference(change)))])
        caption = (
            f"At a speciality of {number(level['speciality'])} ({level['why']}): versatility, and instruction "
            f"following apart, on each method's own frontier, and the difference to {reference}'s with its 95 % "
            "interval, in points."
        )
        yield Table(caption, head, rows)


def _points(content: Entry) -> Table:
    def row(method: str, rate: str, alpha: str, mark: str, scores: Entry) -> list[str]:
        return [method, rate, alpha, mark, *(number(scores[s]) for s in SCORES)]

    rows = [row("base", "", "0", "", content["base"])]
    for p in content["points"]:
        mark = "yes" if p["on_frontier"] else f"no: {p['dominated_by'] or _equal_to(content, p)}"
        rows.append(row(p["method"], f"{p['learning_rate']:g}", f"{p['alpha']:g}", mark, p["scores"]))
    caption = "Every point, means over the seeds: whether it is on its method's frontier, or which point is better."
    return Table(caption, ["method", "rate", "alpha", "on the frontier", *SCORES], rows, folded=True)


def _equal_to(content: Entry, point: Entry) -> str:
    """Of a point that none dominates and that is not on the frontier: which point there has the same scores."""
    scores = {p["id"]: p["scores"] for p in content["points"]} | {"base": content["base"]}
    for other in content["frontiers"][point["method"]]:
        if all(isclose(scores[other][s], point["scores"][s], abs_tol=1e-9) for s in ("speciality", "versatility")):
            return f"as good as {other}"
    return "as good as another"


def _difference(result: Entry | None) -> str:
    if result is None:
        return ""
    if result["low"] is None:
        return f"{signed(result['value'])}\nno interval: only {draws_share(result)} of the draws inside"
    part = "" if result["draws_inside"] == 1 else f", {draws_share(result)} of the draws inside"
    low, high = signed(result["low"]), signed(result["high"])
    return f"{signed(result['value'])}\n{low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high}{part}"
