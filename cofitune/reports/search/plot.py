"""A search as a picture: the tree of its trials with their changes, and what each learnt against what it kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cofitune.reports.figure import GRID, INK, MUTED, PAPER, SERIES, Picture, draw, legend, shortened
from cofitune.reports.search.rows import TrialRow, nested, trial_rows
from cofitune.reports.shape import Entry
from cofitune.reports.text import number

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[float, float]  # speciality, versatility
Changes = Mapping[str, float | None]  # name of a score → its change against the base's

LOOKS = dict(zip(("speciality", "versatility", "unified"), zip(SERIES, ("o", "s", "D"), strict=False), strict=True))
LOSS_LOOKS = {"speciality loss": LOOKS["speciality"], "drift": LOOKS["versatility"]}
WINNER, FRONTIER, QUIET = SERIES[1], SERIES[0], SERIES[6]
ROW, ROW_WITH_BARS, BELOW = 0.22, 0.32, 3.1  # inches


def search_picture(name: str, tree: Entry) -> Picture:
    """Above, the tree of regions and the change that each trial's scores are of the base's; below, all in one plane.

    A search on losses shows losses and drift in the place of scores, and below the way of each trial's training.

    Args:
        tree: the content of a search's tree.json, or as much of it as there is; at least one trial.
    """
    rows = trial_rows(tree["base"], tree["trials"], tree.get("winner"))[1:]
    entries = [trial for trial, _ in nested(tree["trials"])]
    on_losses = bool(tree["base"].get("curve"))
    changes = [
        _loss_changes(e, tree["base"]) if on_losses else row.changes for e, row in zip(entries, rows, strict=True)
    ]
    has_bars = any(row.intervals for row in rows)
    above = (ROW_WITH_BARS if has_bars else ROW) * len(rows) + 0.95

    def paint(figure: Figure, narrow: bool) -> None:
        parts = figure.subplot_mosaic(
            [["tree", "dots"], ["plane", "plane"]],
            height_ratios=(above, BELOW),
            width_ratios=(1.1, 1) if narrow else (0.8, 1.4),
        )
        _paint_tree(parts["tree"], rows, changes)
        _paint_changes(parts["dots"], rows, changes, LOSS_LOOKS if on_losses else LOOKS)
        unit = "nats a token" if on_losses else "points"
        parts["dots"].set_xlabel(f"change against{chr(10) if narrow else ' '}the base ({unit})")
        if on_losses:
            _paint_ways(parts["plane"], entries, tree)
        else:
            _paint_plane(parts["plane"], entries, tree)
        legend(figure, 2 if narrow else 4)

    won = next((row for row in rows if row.mark == "won"), None)
    unified = won.scores.get("unified") if won else None
    message = f"The winner is {won.region}" if won else "There is no winner yet"
    message += "" if unified is None else f", unified {number(unified)}"
    heights = above + BELOW, above + BELOW + 0.3
    return draw(
        name, _caption(rows, on_losses, has_bars), f"Tree of {len(rows)} trials with dots. {message}.", paint, heights
    )


def frontier(places: Iterable[Place]) -> list[Place]:
    """Those that no other beats in one score without losing in the other, by rising speciality."""
    best: list[Place] = []
    for place in sorted(places, reverse=True):
        if not best or place[1] > best[-1][1]:
            best.append(place)
    return best[::-1]


def _caption(rows: Sequence[TrialRow], on_losses: bool, has_bars: bool) -> str:
    text = (
        "The search: each region stands below the one that it lies in, ★ is the winner; dots are what a short training "
        "of it changes against the untouched base, in "
    )
    text += "nats a token (less is better)" if on_losses else "points of the score"
    text += ", bars their 95 % intervals" if has_bars else ""
    text += "" if all(r.is_whole for r in rows) else "; hollow dots are of trials that were stopped on the way"
    if on_losses:
        return text + ". Below, how each training went: right is learnt, low is kept."
    return text + ". Below, the trials that ran to their end: right is learnt, high is kept."


def _loss_changes(trial: Entry, base: Entry) -> Changes:
    """A trial's speciality loss and drift after its last step, against the base's."""
    curve, start = trial.get("curve"), base["curve"][0]
    if not curve:
        return dict.fromkeys(LOSS_LOOKS)
    return {"speciality loss": curve[-1]["loss"] - start["loss"], "drift": curve[-1]["drift"] - start["drift"]}


def _paint_changes(
    axes: Axes,
    rows: Sequence[TrialRow],
    changes: Sequence[Changes],
    looks: Mapping[str, tuple[str, str]],
) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.9)
    has_bars = any(row.intervals for row in rows)
    for place, (score, (colour, marker)) in enumerate(looks.items()):
        offset = 0.22 * (place - 1) if has_bars else 0.0
        axes.plot([], [], marker, color=colour, linestyle="none", label=score, markersize=5)
        for y, (row, change) in enumerate(zip(rows, changes, strict=True)):
            value, ends = change[score], row.intervals.get(score)
            if value is None:
                continue
            if ends is not None:
                axes.plot(ends, [y + offset] * 2, color=colour, linewidth=1.0)
            axes.plot(
                value, y + offset, marker, color=colour, linestyle="none", markersize=5, zorder=3,
                markerfacecolor=colour if row.is_whole else PAPER, markeredgecolor=PAPER if row.is_whole else colour,
                markeredgewidth=0.6 if row.is_whole else 1.1,
            )  # fmt: skip
    for y, change in enumerate(changes):
        if set(change.values()) == {None}:
            axes.text(0, y, "  no scores", va="center", color=MUTED, fontsize=7)
    axes.grid(visible=True, axis="y", color=GRID)
    axes.set_yticks(range(len(rows)))
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _paint_tree(axes: Axes, rows: Sequence[TrialRow], changes: Sequence[Changes]) -> None:
    step = 0.06
    last_at: dict[int, int] = {0: -1}  # depth → the row that last stood there
    for y, (row, change) in enumerate(zip(rows, changes, strict=True)):
        x = step * (row.depth - 1)
        if row.depth > 1 and row.depth - 1 in last_at:
            above = last_at[row.depth - 1]
            axes.plot([x - step * 0.6] * 2, [above + 0.3, y], color=MUTED, linewidth=0.7)
            axes.plot([x - step * 0.6, x - step * 0.1], [y, y], color=MUTED, linewidth=0.7)
        last_at[row.depth] = y
        star = "★ " if row.mark == "won" else ""
        # the star is in DejaVu Sans and in every system's fonts
        axes.text(
            x, y, star + shortened(row.region, 28), va="center", fontsize=7.5, clip_on=False,
            color=MUTED if set(change.values()) == {None} else INK, fontweight="bold" if row.mark else "normal",
        )  # fmt: skip
    axes.set_xlim(-0.02, 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _paint_plane(axes: Axes, entries: Sequence[Entry], tree: Entry) -> None:
    """Speciality against versatility of what ran to its end; the others' scores are of fewer steps."""
    base = tree["base"]
    shown = [(e, place) for e in entries if e["status"] == "done" and (place := _place(e))]
    edge = frontier([place for _, place in shown] + ([place] if (place := _place(base)) else []))
    axes.plot(*zip(*edge, strict=True) if edge else ((), ()), color=FRONTIER, linewidth=1.2, zorder=1,
        drawstyle="steps-pre", label="no trial has more of both",
    )  # fmt: skip
    for entry, (x, y) in shown:
        won, tied = entry["id"] == tree.get("winner"), (entry.get("to_winner") or {}).get("tied")
        for name, (low, high) in (entry.get("intervals") or {}).items():
            ends = [(base.get(name) or 0.0) + low, (base.get(name) or 0.0) + high]
            if name in ("speciality", "versatility"):
                line = (ends, [y, y]) if name == "speciality" else ([x, x], ends)
                axes.plot(*line, color=QUIET, linewidth=0.8, zorder=0.5)
        label = "winner" if won else "not told apart from it" if tied else "another trial"
        axes.plot(
            x, y, "*" if won else "o", color=WINNER if won or tied else QUIET, linestyle="none", label=label, zorder=3,
            markersize=13 if won else 6, markerfacecolor=PAPER if tied and not won else WINNER if won else QUIET,
            markeredgewidth=0.8 if won or not tied else 1.5, markeredgecolor=PAPER if won or not tied else WINNER,
        )  # fmt: skip
    if place := _place(base):
        axes.plot(
            *place, "D", color=INK, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8, linestyle="none",
            label="the base, nothing trained", zorder=2,
        )  # fmt: skip
    axes.set_xlabel("speciality (score, 0 is guessing, 100 all right)")
    axes.set_ylabel("versatility (score, same scale)")
    axes.margins(0.1)


def _paint_ways(axes: Axes, entries: Sequence[Entry], tree: Entry) -> None:
    """Drift against speciality loss along each training, from the base on; learning goes to the right."""
    start = tree["base"]["curve"][0]
    for entry in sorted(entries, key=lambda e: e["id"] == tree.get("winner")):
        if not entry.get("curve"):
            continue
        won = entry["id"] == tree.get("winner")
        points = [start, *entry["curve"]]
        axes.plot(
            [p["loss"] for p in points], [p["drift"] for p in points], "*-" if won else "o-", zorder=3 if won else 1,
            color=WINNER if won else QUIET, markersize=9 if won else 3, linewidth=1.6 if won else 0.8,
            label="winner" if won else "another trial",
        )  # fmt: skip
    axes.plot(
        start["loss"], start["drift"], "D", color=INK, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8,
        linestyle="none", label="the base, nothing trained", zorder=4,
    )  # fmt: skip
    axes.invert_xaxis()
    axes.set_xlabel("speciality loss (nats a token; less is better)")
    axes.set_ylabel("drift (nats a token)")


def _place(trial: Entry) -> Place | None:
    speciality, versatility = trial.get("speciality"), trial.get("versatility")
    return None if speciality is None or versatility is None else (speciality, versatility)
