"""The three figures of a trial as tables show them: scores, or losses and drift; their names, units and direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cofitune.reports.search.tree import Row


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
