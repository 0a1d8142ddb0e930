"""A search for the report: its trials as rows in the tree's order, and as a picture. Reads what tree.json holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cofitune.errors import RegionError
from cofitune.model.region import region_from_dict
from cofitune.reports.figure import GRID, INK, MUTED, PAPER, SERIES, Picture, draw, shortened
from cofitune.reports.text import region_text

Entry = Mapping[str, Any]
SCORES = ("speciality", "versatility", "unified")
LOOKS = dict(zip(SCORES, zip(SERIES, ("o", "s", "D"), strict=False), strict=True))


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        region: layers × modules; `the base` for what trains nothing.
        depth: how many regions it lies in; 0 for the base.
        mark: `won`, `path` (on the way to the winner) or nothing.
        weights: trained ones.
        scores: speciality, versatility and unified, 0 to 100, where they are known.
        changes: the same against the base, in points.
        intervals: the ends of the changes' 95 % intervals, where they are known.
        is_whole: whether the scores are those of a whole trial, and not of one that was stopped on the way.
        seconds: wall time of training and evaluation.
        note: why it has no scores, or what else is to be said of it.
    """

    region: str
    depth: int
    mark: str
    weights: int
    scores: dict[str, float | None]
    changes: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    is_whole: bool
    seconds: float
    note: str


def trial_rows(base: Entry, trials: Sequence[Entry], winner: str | None) -> list[TrialRow]:
    """The base, then each trial below the one whose region it lies in."""
    by_id = {trial["id"]: trial for trial in trials}
    path = set()
    here = winner
    while here in by_id and here not in path:
        path.add(here)
        here = by_id[here].get("parent")
    rows = [_row(base, base, 0, "")]
    for trial, depth in _nested(trials, by_id):
        mark = "won" if trial["id"] == winner else "path" if trial["id"] in path else ""
        rows.append(_row(trial, base, depth, mark))
    return rows


def search_picture(name: str, rows: Sequence[TrialRow]) -> Picture:
    """The tree of regions at the left; at the right the change that each trial's scores are of the base's.

    Args:
        rows: `trial_rows`, the base first, and at least one trial.
    """
    trials = rows[1:]

    def paint(figure: Any, narrow: bool) -> None:
        tree, dots = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1) if narrow else (0.8, 1.4))
        _paint_tree(tree, trials)
        dots.axvline(0, color=MUTED, linewidth=0.9)
        for number, score in enumerate(LOOKS):
            _paint_changes(dots, trials, score, 0.22 * (number - 1) if any(row.intervals for row in trials) else 0.0)
        for y, row in enumerate(trials):
            if row.note and row.scores["unified"] is None:
                dots.text(0, y, "  no scores", va="center", color=MUTED, fontsize=7)
        dots.set_xlabel("change against\nthe base (points)" if narrow else "change against the base (points)")
        dots.grid(visible=True, axis="y", color=GRID)
        dots.tick_params(axis="y", length=0, labelleft=False)
        dots.spines["left"].set_visible(False)
        dots.set_ylim(len(trials) - 0.4, -0.6)
        figure.legend(*dots.get_legend_handles_labels(), loc="outside upper left", ncols=3, handletextpad=0.2)

    won = next((row for row in trials if row.mark == "won"), None)
    message = f"The winner is {won.region}, unified {won.scores['unified']:.1f}" if won else "There is no winner yet"
    caption = (
        "The search: each region stands below the one that it lies in, ★ is the winner; dots are what a short training "
        "of it changes against the untouched base, in points of the score"
    )
    caption += ", bars their 95 % intervals" if any(row.intervals for row in trials) else ""
    caption += (
        "; hollow dots are of trials that were stopped on the way." if not all(r.is_whole for r in trials) else "."
    )
    height = (0.32 if any(row.intervals for row in trials) else 0.22) * len(trials) + 0.95
    return draw(name, caption, f"Tree of {len(trials)} trials with dots. {message}.", paint, (height, height + 0.1))


def _paint_changes(axes: Any, trials: Sequence[TrialRow], score: str, offset: float) -> None:
    colour, marker = LOOKS[score]
    axes.plot([], [], marker, color=colour, linestyle="none", label=score, markersize=5)
    for y, row in enumerate(trials):
        value, ends = row.changes[score], row.intervals.get(score)
        if value is None:
            continue
        if ends is not None:
            axes.plot(ends, [y + offset] * 2, color=colour, linewidth=1.0)
        axes.plot(
            value, y + offset, marker, color=colour, linestyle="none", markersize=5, zorder=3,
            markerfacecolor=colour if row.is_whole else PAPER, markeredgecolor=PAPER if row.is_whole else colour,
            markeredgewidth=0.6 if row.is_whole else 1.1,
        )  # fmt: skip


def _paint_tree(axes: Any, trials: Sequence[TrialRow]) -> None:
    step = 0.06
    last_at: dict[int, int] = {0: -1}  # depth → the row that last stood there
    for y, row in enumerate(trials):
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
            color=INK if row.scores["unified"] is not None else MUTED, fontweight="bold" if row.mark else "normal",
        )  # fmt: skip
    axes.set_xlim(-0.02, 1)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelleft=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _nested(trials: Sequence[Entry], by_id: Mapping[str, Entry]) -> Iterator[tuple[Entry, int]]:
    """Each trial with its depth from 1, children behind their parent, otherwise in the order they were tried."""
    below: dict[str | None, list[Entry]] = {}
    for trial in trials:
        parent = trial.get("parent")
        below.setdefault(parent if parent in by_id else None, []).append(trial)

    def walk(parent: str | None, depth: int) -> Iterator[tuple[Entry, int]]:
        for trial in below.pop(parent, []):
            yield trial, depth
            yield from walk(trial["id"], depth + 1)

    yield from walk(None, 1)


def _row(trial: Entry, base: Entry, depth: int, mark: str) -> TrialRow:
    scores = {name: trial.get(name) for name in SCORES}
    changes = {
        name: None if value is None or base.get(name) is None or depth == 0 else value - base[name]
        for name, value in scores.items()
    }
    status = trial["status"]
    note = trial.get("reason") or ""
    if status not in ("done", "failed"):
        note = f"{status} at step {trial.get('steps', '?')}{': ' if note else ''}{note}"
    if (trial.get("to_winner") or {}).get("tied"):
        note = "not told apart from the winner"
    if trial.get("misses_floor_by"):
        note = f"misses the floor by {trial['misses_floor_by']:.1f} points"
    return TrialRow(
        region=_region(trial.get("region")),
        depth=depth,
        mark=mark,
        weights=trial.get("num_trained", 0),
        scores=scores,
        changes=changes,
        intervals={name: tuple(ends) for name, ends in (trial.get("intervals") or {}).items()},
        is_whole=status in ("done", "failed"),
        seconds=trial.get("seconds", 0.0),
        note=" ".join(str(note).split()),
    )


def _region(region: Entry | None) -> str:
    try:
        return region_text(region_from_dict(region) if region else None)
    except RegionError:
        return str(region)
