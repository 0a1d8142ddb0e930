"""An evaluation as pictures: speciality against versatility, and every task's change with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cofitune.reports.evaluation.table import CATEGORIES
from cofitune.reports.figure import GRID, INK, MUTED, PAPER, Picture, draw, legend, series, shortened

Entry = Mapping[str, Any]
POINTS = "change against the base (points)"
ROW, MODEL = 0.17, 0.07  # inches a row takes, and each model more in it


@dataclass(frozen=True)
class Point:
    """One model: its two scores (0 to 100), each with the ends of its interval; the base has none of these."""

    label: str
    speciality: float
    versatility: float
    speciality_interval: tuple[float, float] | None = None
    versatility_interval: tuple[float, float] | None = None


def points_of(scores: Entry) -> list[Point]:
    """The models that have both scores, the base first. The interval of a model is that of its change, at its score."""
    base, *_ = scores["models"]
    changes = {c["model"]: c["summary"] for c in scores["comparisons"] if c["against"] == base}
    points = []
    for name, own in scores["models"].items():
        values = own["categories"]["speciality"], own["versatility"]
        if None in values:
            continue
        change = changes.get(name, {})
        ends = [_at(change.get(what), value) for what, value in zip(("speciality", "versatility"), values, strict=True)]
        points.append(Point(name, *values, *ends))
    return points


def frontier_picture(name: str, points: Sequence[Point], speciality_weight: float) -> Picture:
    """Every model's speciality against its versatility; what lies above the dashed line has a higher unified score.

    Args:
        points: two or more, the base first.
    """
    base = points[0]

    def paint(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        axes.set_xlabel("speciality (score, 0 is guessing, 100 all right)")
        axes.set_ylabel("versatility (score, same scale)")
        if 0 < speciality_weight < 1:
            slope = -speciality_weight / (1 - speciality_weight)
            axes.axline(
                (base.speciality, base.versatility), slope=slope, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.8
            )
        for number, point in enumerate(points):
            colour, marker = (INK, "D") if number == 0 else series(number - 1)
            _cross(axes, point, colour)
            axes.plot(
                point.speciality, point.versatility, marker, color=colour, markersize=6 if number else 8.5,
                markeredgecolor=PAPER, markeredgewidth=0.8, label=shortened(point.label, 28), zorder=3,
                linestyle="none",
            )  # fmt: skip
        axes.margins(0.12)
        legend(figure, 2 if narrow else 4)

    message = "; ".join(f"{p.label}: speciality {p.speciality:.1f}, versatility {p.versatility:.1f}" for p in points)
    caption = (
        "Speciality against versatility, both as scores from 0 (guessing) to 100. Bars are 95 % intervals of the "
        "change against the base. Right of and above the dashed line the unified score is higher than the base's."
    )
    return draw(name, caption, f"Scatter plot. {message}.", paint, (3.5, 3.1))


def deltas_picture(name: str, scores: Entry) -> Picture:
    """A dot with its 95 % interval for each score and model; hollow where the interval contains 0.

    Args:
        scores: the content of scores.json, with one model or more besides the base.
    """
    base, *others = scores["models"]
    changes = {c["model"]: c for c in scores["comparisons"] if c["against"] == base}
    rows = list(_rows(scores))
    units = {title: about["unit"] for title, about in scores["tasks"].items()}
    losses = [title for title, unit in units.items() if unit == "nats"]
    left_out = [title for title, unit in units.items() if unit not in ("share", "nats")]

    def paint(figure: Any, narrow: bool) -> None:
        panels = [(rows, POINTS)]
        if losses:
            panels.append(([(t, t) for t in losses], "change of the loss (nats; less is better)"))
        sizes = [len(part) + 1.5 for part, _ in panels]
        for axes, (part, label) in zip(
            figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0], panels, strict=True
        ):
            _dots(axes, part, [(m, changes[m]) for m in others], 16 if narrow else 30)
            axes.set_xlabel(label)
        legend(figure, 2 if narrow else 4)

    height = (ROW + MODEL * len(others)) * (len(rows) + len(losses)) + (1.5 if losses else 0.9)
    results = [
        f"{m}: " + ", ".join(f"{n} {c[n]['value']:+.1f}" for n in CATEGORIES if c[n])
        for m, c in ((m, changes[m]["summary"]) for m in others)
    ]
    caption = (
        "Changes against the base, in points of the score (a loss: in nats), with 95 % intervals of the paired "
        "bootstrap. A filled marker: the interval leaves 0 out."
    )
    caption += f" Not drawn, each on a scale of its own: {', '.join(left_out)}." if left_out else ""
    return draw(name, caption, f"Dot plot. {'; '.join(results)}.", paint, (height, height + 0.2))


def _rows(scores: Entry) -> list[tuple[str, str | None]]:
    """From top to bottom: a category or summary (name, None) and below it its tasks (title, title)."""
    rows: list[tuple[str, str | None]] = []
    for category in CATEGORIES:
        own = [t for t, a in scores["tasks"].items() if a["category"] == category and a["unit"] == "share"]
        rows += [(category, None), *((t, t) for t in own)] if own else []
    return [*rows, ("versatility", None), ("unified", None)]


def _dots(axes: Any, rows: Sequence[tuple[str, str | None]], models: Sequence[tuple[str, Entry]], most: int) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.9)
    spread = min(0.28, 0.66 / max(1, len(models)))
    for number, (model, comparison) in enumerate(models):
        colour, marker = series(number)
        offset = (number - (len(models) - 1) / 2) * spread
        first = True
        for row, (name, title) in enumerate(rows):
            change = comparison["tasks"][title] if title else comparison["summary"].get(name)
            if change is None:
                continue
            y = row + offset
            axes.plot(
                [change["low"], change["high"]],
                [y, y],
                color=colour,
                linewidth=2.0 if title is None else 1.1,
                solid_capstyle="butt",
            )
            is_told = change["low"] > 0 or change["high"] < 0
            axes.plot(
                change["value"], y, marker, color=colour, markersize=5.2 if title is None else 4.2,
                markerfacecolor=colour if is_told else PAPER, markeredgewidth=1.1, linestyle="none",
                label=shortened(model, 28) if first else None, zorder=3,
            )  # fmt: skip
            first = False
    axes.set_ylim(len(rows) - 0.4, -0.6)
    labels = [shortened(name, most) if title is None else "   " + shortened(name, most) for name, title in rows]
    axes.set_yticks(range(len(rows)), labels)
    for text, (_, title) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if title is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="y", color=GRID)


def _cross(axes: Any, point: Point, colour: str) -> None:
    line = {"color": colour, "linewidth": 1.0, "alpha": 0.75, "zorder": 2}
    if point.speciality_interval is not None:
        axes.plot(point.speciality_interval, [point.versatility] * 2, **line)
    if point.versatility_interval is not None:
        axes.plot([point.speciality] * 2, point.versatility_interval, **line)


def _at(change: Entry | None, value: float) -> tuple[float, float] | None:
    if change is None:
        return None
    return value - change["value"] + change["low"], value - change["value"] + change["high"]
