"""What a search's picture shows, taken from tree.json: its trials as dots, their rows in the tree, the frontier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cofitune.model.region import region_from_dict
from cofitune.reports.text import region_text

Place = tuple[float, float]  # versatility, speciality


@dataclass(frozen=True)
class Dot:
    """One trial as it is drawn.

    Attributes:
        status: done, stopped or paused (its scores are of fewer `steps` than the others'), or failed (no scores).
        tied: it cannot be told apart from the winner on the items of this search.
        bars: of speciality and versatility, the ends of the 95 % interval of the change against the base, around the
            base's score: in points; where known.
    """

    id: str
    parent: str | None
    level: int
    label: str
    status: str
    speciality: float | None
    versatility: float | None
    unified: float | None
    steps: int | None = None
    tied: bool = False
    bars: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Picture:
    """What is drawn: the base, the trials in the order they were reached, and who won."""

    base: Dot
    dots: tuple[Dot, ...]
    winner: str
    columns: tuple[str, ...]
    title: str

    @property
    def finished(self) -> list[Dot]:
        """Those whose scores can be compared: trials that ran to their last step."""
        return [dot for dot in self.dots if dot.status == "done"]


def read_picture(tree: Mapping[str, Any]) -> Picture:
    """Take from tree.json what is drawn."""
    columns = ["base"]
    for number, level in enumerate(tree["levels"], start=1):
        columns.append(f"level {number}: {level['tries'].partition(':')[0]}")
    dots = tuple(_dot(trial, tree["base"]) for trial in tree["trials"])
    steps = tree.get("identity", {}).get("train", {}).get("steps")
    finished = sum(dot.status == "done" for dot in dots)
    title = f"{finished} finished trial{'' if finished == 1 else 's'}"
    title += f" of {steps} optimizer steps" if steps else ""
    return Picture(_dot(tree["base"], tree["base"]), dots, tree["winner"], tuple(columns), title)


def place_rows(picture: Picture) -> dict[str, float]:
    """The row of each trial from the top: leaves one below the other, each parent in the middle of its children."""
    children = children_of(picture)
    rows: dict[str, float] = {}

    def place(name: str, leaf: int) -> int:
        below = children.get(name, [])
        for child in below:
            leaf = place(child, leaf)
        rows[name] = (rows[below[0]] + rows[below[-1]]) / 2 if below else leaf
        return leaf if below else leaf + 1

    place(picture.base.id, 0)
    return rows


def frontier(places: Iterable[Place]) -> list[Place]:
    """Those that no other beats in one score without losing in the other, by rising versatility."""
    best: list[Place] = []
    for place in sorted(places, reverse=True):
        if not best or place[1] > best[-1][1]:
            best.append(place)
    return best[::-1]


def children_of(picture: Picture) -> dict[str, list[str]]:
    """Ids below each id; what has no parent in the tree lies below the base."""
    known = {dot.id for dot in picture.dots}
    children: dict[str, list[str]] = {}
    for dot in picture.dots:
        children.setdefault(dot.parent if dot.parent in known and dot.parent else picture.base.id, []).append(dot.id)
    return children


def way_to_winner(picture: Picture) -> set[str]:
    """The ids from the base to the winner."""
    parents = {dot.id: dot.parent for dot in picture.dots}
    way: set[str] = set()
    here: str | None = picture.winner
    while here in parents and here not in way:
        way.add(here)
        here = parents[here]
    return way


def place_of(dot: Dot) -> Place | None:
    """Versatility and speciality; None where one is not known."""
    if dot.versatility is None or dot.speciality is None:
        return None
    return dot.versatility, dot.speciality


def _dot(trial: Mapping[str, Any], base: Mapping[str, Any]) -> Dot:
    region = trial["region"]
    intervals = {name: ends for name, ends in (trial.get("intervals") or {}).items() if base.get(name) is not None}
    return Dot(
        id=trial["id"],
        parent=trial.get("parent"),
        level=trial["level"],
        label=region_text(region_from_dict(region) if region else None),
        status=trial["status"],
        speciality=trial.get("speciality"),
        versatility=trial.get("versatility"),
        unified=trial.get("unified"),
        steps=trial.get("steps"),
        tied=bool((trial.get("to_winner") or {}).get("tied")),
        bars={name: (base[name] + low, base[name] + high) for name, (low, high) in intervals.items()},
    )
