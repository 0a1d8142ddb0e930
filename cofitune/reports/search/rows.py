"""A search's trials as rows in the tree's order. Reads what tree.json holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cofitune.errors import RegionError
from cofitune.model.region import region_from_dict
from cofitune.reports.search.row import LOSSES
from cofitune.reports.shape import Entry
from cofitune.reports.text import region_text

SCORES = ("speciality", "versatility", "unified")


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
    for trial, depth in nested(trials):
        mark = "won" if trial["id"] == winner else "path" if trial["id"] in path else ""
        rows.append(_row(trial, base, depth, mark))
    return rows


def nested(trials: Sequence[Entry]) -> Iterator[tuple[Entry, int]]:
    """Each trial with its depth from 1, children behind their parent, otherwise in the order they were tried."""
    known = {trial["id"] for trial in trials}
    below: dict[str | None, list[Entry]] = {}
    for trial in trials:
        parent = trial.get("parent")
        below.setdefault(parent if parent in known else None, []).append(trial)

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
    if (trial.get("to_winner") or {}).get("tied") or trial.get("tied"):
        note = "not told apart from the winner"
    if trial.get("curve"):
        note = "; ".join(filter(None, (_losses(trial, base), note)))
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


def _losses(trial: Entry, base: Entry) -> str:
    """The figures of a search on losses, which has no scores to stand in the columns."""
    last, start = trial["curve"][-1], (base.get("curve") or trial["curve"])[0]
    text = f"speciality loss {LOSSES.number(last['loss'])}"
    if trial is base:
        return f"{text} nats a token"
    text += f" ({LOSSES.change(last['loss'], start['loss'])}), drift {LOSSES.number(last['drift'])}"
    equal = trial.get("drift_at_common_loss")
    return text + ("" if equal is None else f", at equal loss {LOSSES.number(equal)}") + " nats a token"


def _region(region: Entry | None) -> str:
    try:
        return region_text(region_from_dict(region) if region else None)
    except RegionError:
        return str(region)
