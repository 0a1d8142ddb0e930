"""A search as a picture: the tree of trials, and what each region gained against what it kept. From tree.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cofitune.reports.figure import save_figure
from cofitune.reports.importance.plot import COLOURS, DOTS_AN_INCH
from cofitune.reports.search.dots import (
    Dot,
    Picture,
    Place,
    children_of,
    frontier,
    place_of,
    place_rows,
    read_picture,
    way_to_winner,
)

# Okabe and Ito's palette: told apart with every kind of colour blindness
WINNER, FRONTIER, QUIET, QUIET_TEXT = "#D55E00", "#0072B2", "#8C8C8C", "#595959"
INCHES_A_ROW, INCHES_A_LEVEL, SCATTER_INCHES = 0.3, 2.35, 5.2
TRUNK = 0.12  # of a level's width: how far before its children a parent's line branches
NARROWEST = 10.0  # inches
PARTLY = "stopped", "paused"  # not trained to the end: their scores cannot be compared with the others'


def draw_search(folder: Path, tree: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write search.png and search.svg; the same tree gives the same bytes.

    Args:
        folder: where to.
        tree: the content of a search's tree.json.

    Returns:
        The two files.
    """
    from matplotlib.figure import Figure

    picture = read_picture(tree)
    rows = place_rows(picture)
    tree_inches = INCHES_A_ROW * (max(rows.values()) + 1) + 1.3
    width = max(NARROWEST, INCHES_A_LEVEL * len(picture.columns) + 0.6)
    figure = Figure(figsize=(width, tree_inches + SCATTER_INCHES), dpi=DOTS_AN_INCH, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(tree_inches, SCATTER_INCHES))
    colours = _colours(picture)
    draw_tree(above, picture, rows, colours)
    draw_scores(below, picture, colours)
    bar = figure.colorbar(colours, ax=(above, below), aspect=40)
    bar.set_label("unified score (points; 0: chance, 100: all right)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(picture.title, fontsize=11)
    return save_figure(figure, folder, "search")


def draw_tree(axes: Any, picture: Picture, rows: Mapping[str, float], colours: Any) -> None:
    """The levels from left to right; the way to the winner is a thick line."""
    by_id = {dot.id: dot for dot in (picture.base, *picture.dots)}
    children, way = children_of(picture), way_to_winner(picture)
    for dot in by_id.values():
        x, y = dot.level, rows[dot.id]
        for child in children.get(dot.id, []):
            style = (
                {"color": "black", "lw": 2.2, "zorder": 2} if child in way else {"color": QUIET, "lw": 0.9, "zorder": 1}
            )
            to = by_id[child].level
            axes.plot([x, to - TRUNK, to - TRUNK, to], [y, y, rows[child], rows[child]], **style)
        _mark(axes, dot, (x, y), picture.winner, colours)
        label, inner, won = _tree_label(dot), bool(children.get(dot.id)), dot.id == picture.winner
        axes.annotate(
            label, (x, y), xytext=(12 if won else 9, 4 if inner else 0), textcoords="offset points", fontsize=8,
            va="bottom" if inner else "center", weight="bold" if won else "normal",
            color=QUIET_TEXT if dot.status != "done" else "black",
        )  # fmt: skip
    deepest = len(picture.columns) - 1
    axes.set_xlim(-0.1, deepest + 0.85)
    axes.set_ylim(max(rows.values()) + 0.8, -0.9)
    axes.set_xticks(range(deepest + 1), picture.columns, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_scores(axes: Any, picture: Picture, colours: Any) -> None:
    """Speciality against versatility, both in points: up is learnt, right is kept."""
    shown = {dot: place for dot in picture.finished if (place := place_of(dot))}
    for dot, place in shown.items():
        _bars(axes, dot, place)
        _mark(axes, dot, place, picture.winner, colours)
    edge = list(shown.values())
    if base := place_of(picture.base):
        axes.scatter(*base, marker="x", s=90, c="black", linewidths=2, zorder=5)
        axes.axvline(base[0], color=QUIET, lw=0.6, ls=":", zorder=0)
        axes.axhline(base[1], color=QUIET, lw=0.6, ls=":", zorder=0)
        edge.append(base)
    edge = frontier(edge)
    axes.plot([x for x, _ in edge], [y for _, y in edge], drawstyle="steps-pre", color=FRONTIER, lw=1.4, zorder=1)
    axes.set_xlabel("versatility (points; 0: chance, 100: all right)", fontsize=9)
    axes.set_ylabel("speciality (points; 0: chance, 100: all right)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    named = {dot: place for dot, place in shown.items() if dot.id == picture.winner or place in edge}
    _name_dots(axes, named, list(shown.values()))
    handles = _legend(picture, list(shown))
    axes.legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False)


def _mark(axes: Any, dot: Dot, at: Place, winner: str, colours: Any) -> None:
    """A dot by its fate: a star that won, a coloured disc that ran to its end, a hollow one, a cross."""
    if dot.status == "failed":
        axes.scatter(*at, marker="X", s=55, c=QUIET, linewidths=0, zorder=4)
    elif dot.status in PARTLY:
        axes.scatter(*at, s=60, facecolors="white", edgecolors=QUIET, linestyles="dashed", linewidths=1.3, zorder=4)
    elif dot.id == winner:
        axes.scatter(*at, marker="*", s=330, c=WINNER, edgecolors="black", linewidths=0.8, zorder=6)
    else:
        colour = QUIET if dot.unified is None else colours.to_rgba(dot.unified)
        axes.scatter(*at, s=70, color=[colour], edgecolors="black", linewidths=0.6, zorder=4)
        if dot.tied:
            axes.scatter(*at, s=190, facecolors="none", edgecolors=WINNER, linewidths=1.5, zorder=4)


def _bars(axes: Any, dot: Dot, place: Place) -> None:
    x, y = place
    for name, at, draw in (("versatility", y, axes.hlines), ("speciality", x, axes.vlines)):
        if name in dot.bars:
            draw(at, *dot.bars[name], color=QUIET, lw=0.8, zorder=0.5)


def _name_dots(axes: Any, named: Mapping[Dot, Place], taken_places: Sequence[Place]) -> None:
    """Write regions beside their dots, where they hide neither a dot nor one another; one that finds no room is left
    out, for the tree above names every one."""
    axes.figure.canvas.draw()  # only now are places known
    taken = [_box(axes, place, -6, 6, -6, 6) for place in taken_places]
    for dot, place in named.items():
        width = 4.6 * len(dot.label)  # points, of 8-point letters
        for dx, dy in ((10, 8), (10, -14), (-10 - width, 8), (-10 - width, -14)):
            box = _box(axes, place, dx, dx + width, dy - 1, dy + 8)
            inside = axes.bbox.x0 <= box[0] and box[1] <= axes.bbox.x1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                style = {"textcoords": "offset points", "fontsize": 8, "zorder": 7}
                axes.annotate(dot.label, place, xytext=(dx, dy), **style)
                break


def _box(axes: Any, place: Place, left: float, right: float, low: float, high: float) -> tuple[float, ...]:
    """A box around a place, its sides in points from there, in pixels: left, right, low, high."""
    across, up = axes.transData.transform(place)
    scale = axes.figure.dpi / 72
    return across + left * scale, across + right * scale, up + low * scale, up + high * scale


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _legend(picture: Picture, shown: Sequence[Dot]) -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle=style.pop("linestyle", "none"), label=label, **style)

    entries = [
        entry("winner", marker="*", ms=14, mfc=WINNER, mec="black"),
        entry("trial", marker="o", ms=8, mfc=QUIET, mec="black"),
        entry("the base, nothing trained", marker="x", ms=8, mec="black", mew=2),
        entry("no trial has more of both", linestyle="-", color=FRONTIER),
    ]
    if any(dot.tied for dot in shown):
        entries.insert(1, entry("not told apart from it", marker="o", ms=12, mfc="none", mec=WINNER))
    if any(dot.bars for dot in shown):
        entries.append(entry("95 % interval of the change", linestyle="-", color=QUIET, lw=0.8))
    if any(dot.status in PARTLY for dot in picture.dots):
        entries.append(entry("not trained to the end (above)", marker="o", ms=8, mfc="white", mec=QUIET))
    if any(dot.status == "failed" for dot in picture.dots):
        entries.append(entry("failed (above)", marker="X", ms=8, mfc=QUIET, mec=QUIET))
    return entries


def _tree_label(dot: Dot) -> str:
    score = "-" if dot.unified is None else f"{dot.unified:.1f}"
    if dot.status == "failed":
        return f"{dot.label}  failed"
    return f"{dot.label}  {score}" + (f", {dot.status} at step {dot.steps}" if dot.status in PARTLY else "")


def _colours(picture: Picture) -> Any:
    """Colours for unified scores, from the lowest to the highest of what ran to its end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scores = [dot.unified for dot in (picture.base, *picture.finished) if dot.unified is not None] or [0.0]
    return ScalarMappable(Normalize(min(scores), max(scores)), COLOURS)
