"""A trial as tables show it, and its three figures: scores, or losses and drift; their names, units and direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cofitune.model.region import Region
from cofitune.reports.text import region_text


@dataclass(frozen=True)
class Scale:
    """What the columns of a search's table mean.

    Attributes:
        columns: headings, of a row's `speciality`, `versatility` and `unified`.
        digits: decimals.
        with_change: for each column, whether the change against the base stands beside.
        legend: units and direction, in words.
    """

    columns: tuple[str, str, str]
    digits: int
    with_change: tuple[bool, bool, bool]
    legend: str

    def number(self, value: float | None) -> str:
        """A figure, or a dash."""
        return "-" if value is None else f"{value:.{self.digits}f}"

    def change(self, now: float | None, before: float | None) -> str:
        """A change with its sign, or a dash."""
        return "-" if now is None or before is None else f"{now - before:+.{self.digits}f}"

    def cells(self, row: Row, base: Row | None) -> tuple[str, str, str]:
        """A row's three figures, with their changes where there is a base to compare with."""

        def cell(now: float | None, before: float | None, changes: bool) -> str:
            return self.number(now) + (f" {self.change(now, before)}" if changes and base else "")

        return (
            cell(row.speciality, base.speciality if base else None, self.with_change[0]),
            cell(row.versatility, base.versatility if base else None, self.with_change[1]),
            cell(row.unified, base.unified if base else None, self.with_change[2]),
        )

    def brief(self, row: Row, base: Row | None) -> str:
        """What a line has room for: the unified score; or loss and drift, since what decides depends on all trials."""
        if self is SCORES:
            return self.cells(row, base)[2]
        speciality, versatility, _ = self.cells(row, base)
        return f"loss {speciality}, drift {versatility}"


SCORES = Scale(
    ("speciality", "versatility", "unified"), 1, (True, True, True), "scores 0-100 with the change against the base"
)
LOSSES = Scale(
    ("loss ↓", "drift ↓", "at equal ↓"),
    3,
    (True, False, False),
    "nats a token, lower is better: speciality loss with its change against the base, drift from the base, and the "
    "drift where all have the same loss",
)


@dataclass(frozen=True)
class Row:
    """One trial as the tree shows it: the base has no region, a failed trial has a reason and no scores.

    Attributes:
        num_trained: trained weights.
        speciality, versatility, unified: scores, 0-100; under `LOSSES` the speciality loss and the drift after the last
            step, and the drift at the loss at which all are compared (None where a trial does not come so far).
        seconds: wall time of training and evaluation, all parts and attempts together.
        reason: why it failed or was stopped.
        status: done, paused, stopped or failed; only what is done is compared with the others.
        steps: optimizer steps that the scores are of.
        behind: the deciding score minus the winner's, with the ends of its 95 % interval (paired on the same items);
            None where it is not known.
        tied: whether the trial cannot be told apart from the winner.
        missed: points by which it misses the floor.
        intervals: of the three scores' changes against the base, the ends of the 95 % intervals, where known.
        scale: what the three figures are.
        seed: of a training that repeats an earlier one's region; else None.
        margins: under `LOSSES`, of gen_kn and gen_rs where they have choices, in nats; higher is better.
    """

    id: str
    parent: str | None
    region: Region | None
    level: int
    num_trained: int
    speciality: float | None
    versatility: float | None
    unified: float | None
    seconds: float
    reason: str | None = None
    status: str = "done"
    steps: int = 0
    behind: tuple[float, float, float] | None = None
    tied: bool = False
    missed: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scale: Scale = SCORES
    margins: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def name(self) -> str:
        """The region, and the seed of a repeated training."""
        return region_text(self.region) + ("" if self.seed is None else f" (seed {self.seed})")

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and scored."""
        return self.status == "done" and self.reason is None
