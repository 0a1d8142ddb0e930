"""A comparison of methods for a page: sentences, tables, and the frontiers. Reads what `compare.json` holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isclose
from typing import Any

from cofitune.reports.compare.table import CATEGORIES, draws_share, sentences
from cofitune.reports.figure import INK, PAPER, Picture, draw, legend, series, shortened
from cofitune.reports.html import Comparison, Table
from cofitune.reports.text import NONE, number, signed

Entry = Mapping[str, Any]
FORMAT = 1  # of compare.json
PANELS = {"versatility": "versatility (score, 0 to 100)", "instruct": "instruction following (score)"}
SCORES = ("speciality", "versatility", *CATEGORIES)


def comparison(content: Entry) -> Comparison:
    """What the comparison found: what it can say, its methods, a table a matched level, and every point."""
    return Comparison(list(sentences(content)), [_methods(content), *_matched(content), _points(content)])


def methods_picture(name: str, content: Entry) -> Picture:
    """Every rate and alpha of each method, its frontier joined; instruction following in a panel of its own."""
    base = content["base"]

    def paint(figure: Any, narrow: bool) -> None:
        panels = figure.subplots(*((2, 1) if narrow else (1, 2)), squeeze=False).ravel()
        for axes, (score, label) in zip(panels, PANELS.items(), strict=True):
            for place, method in enumerate(content["methods"]):
                _paint_method(axes, content, method, score, series(place))
            if base[score] is not None:
                axes.plot(
                    base["speciality"], base[score], "D", color=INK, markersize=7, markeredgecolor=PAPER,
                    markeredgewidth=0.8, label="base", linestyle="none", zorder=2,
                )  # fmt: skip
            axes.set_xlabel("speciality (score, 0 to 100)")
            axes.set_ylabel(label)
            axes.margins(0.08)
        legend(figure, 2 if narrow else 4)

    best = {p["method"]: p["scores"] for p in sorted(content["points"], key=lambda p: p["scores"]["speciality"])}
    message = "; ".join(
        f"{m}: speciality up to {s['speciality']:.1f}, versatility {number(s['versatility'])} there"
        for m, s in best.items()
    )
    caption = (
        "Every learning rate and alpha of each method, means over the seeds: versatility, and instruction following "
        "apart, against speciality (0 is guessing, 100 all right). Filled and joined: a method's own frontier; hollow: "
        "another of its points, or the base, is as good in both and better in one."
    )
    rows = len(content["methods"]) // 4 + 1
    heights = 2.9 + 0.18 * rows, 5.0 + 0.18 * (len(content["methods"]) // 2 + 1)
    return draw(name, caption, f"Two scatter plots. {message}.", paint, heights)


def _paint_method(axes: Any, content: Entry, method: str, score: str, look: tuple[str, str]) -> None:
    colour, marker = look
    own = {p["id"]: p for p in content["points"] if p["method"] == method}
    ends = [content["base"] if point == "base" else own[point]["scores"] for point in content["frontiers"][method]]
    known = [entry for entry in ends if entry[score] is not None]
    axes.plot([e["speciality"] for e in known], [e[score] for e in known], color=colour, linewidth=1.0)
    for is_filled in (False, True):
        results = [
            p["scores"] for p in own.values() if p["on_frontier"] == is_filled and p["scores"][score] is not None
        ]
        axes.plot(
            [s["speciality"] for s in results], [s[score] for s in results], marker, color=colour, markersize=4.8,
            markerfacecolor=colour if is_filled else PAPER, markeredgewidth=0.9, linestyle="none", zorder=3,
            label=shortened(method, 24) if is_filled else None,
        )  # fmt: skip


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
            cells = [[number(row.get(s)), _difference(row.get(f"{s}_against_reference"))] for s in PANELS]
            rows.append([method, *cells[0], *cells[1]])
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
