"""An evaluation as pictures: speciality against versatility, and every task's change with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cofitune.reports.evaluation.scores import CATEGORIES, Change, Comparison, Scores
from cofitune.reports.figure import GRID, INK, MUTED, PAPER, Picture, draw, legend, series, shortened

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def points_of(scores: Scores) -> list[Point]:
    """The models that have both scores, the base first. The interval of a model is that of its change, at its score."""
    points = []
    for name, own in scores.models.items():
        speciality, versatility = own.score("speciality"), own.versatility
        if speciality is None or versatility is None:
            continue
        comparison = scores.against_base.get(name)
        changes = comparison.summary if comparison else {}
        ends = _at(changes.get("speciality"), speciality), _at(changes.get("versatility"), versatility)
        points.append(Point(name, speciality, versatility, *ends))
    return points


def frontier_picture(name: str, points: Sequence[Point], speciality_weight: float) -> Picture:
    """Every model's speciality against its versatility; what lies above the dashed line has a higher unified score.

    Args:
        points: two or more, the base first.
    """
    base = points[0]

    def paint(figure: Figure, narrow: bool) -> None:
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


def deltas_picture(name: str, scores: Scores) -> Picture:
    """A dot with its 95 % interval for each score and model; hollow where the interval contains 0.

    Args:
        scores: with one model or more besides the base.
    """
    changes = scores.against_base
    rows = list(_rows(scores))
    losses = [title for title, task in scores.tasks.items() if task.unit == "nats"]
    left_out = [title for title, task in scores.tasks.items() if task.unit not in ("share", "nats")]

    def paint(figure: Figure, narrow: bool) -> None:
        panels = [(rows, POINTS)]
        if losses:
            panels.append(([(t, t) for t in losses], "change of the loss (nats; less is better)"))
        sizes = [len(part) + 1.5 for part, _ in panels]
        for axes, (part, label) in zip(
            figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0], panels, strict=True
        ):
            _dots(axes, part, list(changes.items()), 16 if narrow else 30)
            axes.set_xlabel(label)
        legend(figure, 2 if narrow else 4)

    height = (ROW + MODEL * len(changes)) * (len(rows) + len(losses)) + (1.5 if losses else 0.9)
    results = [
        f"{model}: " + ", ".join(f"{n} {change.value:+.1f}" for n in CATEGORIES if (change := comparison.summary[n]))
        for model, comparison in changes.items()
    ]
    caption = (
        "Changes against the base, in points of the score (a loss: in nats), with 95 % intervals of the paired "
        "bootstrap. A filled marker: the interval leaves 0 out."
    )
    caption += f" Not drawn, each on a scale of its own: {', '.join(left_out)}." if left_out else ""
    return draw(name, caption, f"Dot plot. {'; '.join(results)}.", paint, (height, height + 0.2))


def _rows(scores: Scores) -> list[tuple[str, str | None]]:
    """From top to bottom: a category or summary (name, None) and below it its tasks (title, title)."""
    rows: list[tuple[str, str | None]] = []
    for category in CATEGORIES:
        own = [title for title in scores.titles(category) if scores.tasks[title].counted]
        rows += [(category, None), *((t, t) for t in own)] if own else []
    return [*rows, ("versatility", None), ("unified", None)]


def _dots(
    axes: Axes, rows: Sequence[tuple[str, str | None]], models: Sequence[tuple[str, Comparison]], most: int
) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.9)
    spread = min(0.28, 0.66 / max(1, len(models)))
    for number, (model, comparison) in enumerate(models):
        colour, marker = series(number)
        offset = (number - (len(models) - 1) / 2) * spread
        first = True
        for row, (name, title) in enumerate(rows):
            change = comparison.tasks[title] if title else comparison.summary.get(name)
            if change is None:
                continue
            y = row + offset
            axes.plot(
                [change.low, change.high],
                [y, y],
                color=colour,
                linewidth=2.0 if title is None else 1.1,
                solid_capstyle="butt",
            )
            axes.plot(
                change.value, y, marker, color=colour, markersize=5.2 if title is None else 4.2,
                markerfacecolor=colour if change.sign else PAPER, markeredgewidth=1.1, linestyle="none",
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


def _cross(axes: Axes, point: Point, colour: str) -> None:
    for x, y in (
        (point.speciality_interval, [point.versatility] * 2),
        ([point.speciality] * 2, point.versatility_interval),
    ):
        if x is not None and y is not None:
            axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.75, zorder=2)


def _at(change: Change | None, value: float) -> tuple[float, float] | None:
    if change is None:
        return None
    return value - change.value + change.low, value - change.value + change.high
