"""The frontiers as a picture: versatility against speciality, and instruction following apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cofitune.reports.compare.content import Comparison
from cofitune.reports.figure import INK, PAPER, Picture, draw, legend, series, shortened
from cofitune.reports.text import number

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

PANELS = {"versatility": "versatility (score, 0 to 100)", "instruct": "instruction following (score)"}


def methods_picture(name: str, content: Comparison) -> Picture:
    """Every rate and alpha of each method, its frontier joined; instruction following in a panel of its own."""
    base = content.base

    def paint(figure: Figure, narrow: bool) -> None:
        panels = figure.subplots(*((2, 1) if narrow else (1, 2)), squeeze=False).ravel()
        for axes, (score, label) in zip(panels, PANELS.items(), strict=True):
            for place, method in enumerate(content.methods):
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
        if partial := content.partial:
            figure.suptitle(f"partial: {partial.done} of {partial.runs} runs", fontsize=8)

    best = {point.method: point for point in sorted(content.points, key=lambda p: p.speciality)}
    message = "; ".join(
        f"{method}: speciality up to {point.speciality:.1f}, versatility {number(point.scores['versatility'])} there"
        for method, point in best.items()
    )
    caption = (
        "Every learning rate and alpha of each method, means over the seeds: versatility, and instruction following "
        "apart, against speciality (0 is guessing, 100 all right). Filled and joined: a method's own frontier; hollow: "
        "another of its points, or the base, is as good in both and better in one."
    )
    rows = len(content.methods) // 4 + 1
    heights = 2.9 + 0.18 * rows, 5.0 + 0.18 * (len(content.methods) // 2 + 1)
    return draw(name, caption, f"Two scatter plots. {message}.", paint, heights)


def _paint_method(axes: Any, content: Comparison, method: str, score: str, look: tuple[str, str]) -> None:
    colour, marker = look
    ends = [content.scores_of(point) for point in content.frontiers[method]]
    known = [entry for entry in ends if entry[score] is not None]
    axes.plot([e["speciality"] for e in known], [e[score] for e in known], color=colour, linewidth=1.0)
    for is_filled in (False, True):
        own = (p.scores for p in content.of_method(method) if p.on_frontier == is_filled)
        results = [scores for scores in own if scores[score] is not None]
        axes.plot(
            [s["speciality"] for s in results], [s[score] for s in results], marker, color=colour, markersize=4.8,
            markerfacecolor=colour if is_filled else PAPER, markeredgewidth=0.9, linestyle="none", zorder=3,
            label=shortened(method, 24) if is_filled else None,
        )  # fmt: skip
