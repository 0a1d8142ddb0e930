"""The picture of `scripts/bench/grid`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grid_report import number_text
from grid_truth import TITLES, UNITS, Results

from cofitune.reports.figure import INK, SERIES, Picture, draw


def picture(results: Sequence[Results], name: str) -> Picture:
    """The two seeds of every region against one another, a panel a measure."""

    def paint(figure: Any, narrow: bool) -> None:
        count = len(results)
        panels = figure.subplots(*((count, 1) if narrow else (1, count)), squeeze=False).ravel()
        for axes, one in zip(panels, results, strict=True):
            first, second = (one.grid.seeds[seed] for seed in sorted(one.grid.seeds)[:2])
            pairs = [(one.grid.figure(first[r]), one.grid.figure(second[r])) for r in one.grid.both]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if known:
                axes.scatter(*zip(*known, strict=True), s=14, color=SERIES[0])
                ends = [f(value for pair in known for value in pair) for f in (min, max)]
                axes.plot(ends, ends, color=INK, linewidth=0.6)
            axes.set_title(TITLES[one.grid.measure], loc="left")
            axes.set_xlabel(f"seed {min(one.grid.seeds)}: {UNITS[one.grid.measure]}")
            axes.set_ylabel(f"seed {max(one.grid.seeds)}")

    told = "; ".join(f"{one.grid.measure} {number_text(one.grid.correlation(), '+.2f')}" for one in results)
    caption = "Every region, trained with two seeds: on the line both say the same."
    alt = f"Rank correlation between the two seeds: {told}."
    return draw(name, caption, alt, paint, (2.8, 2.6 * len(results)))
