"""From shares of right answers to speciality, versatility and unified.

The definitions are ours, since the paper's own formula is not known to us (docs/method.md).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

SPECIALITY = "speciality"
VERSATILITY = ("gen_kn", "gen_rs", "instruct")
SUMMARIES = (SPECIALITY, *VERSATILITY, "versatility", "unified")

# one score, or an array of them (bootstrap draws × models): the account is the same
Value = TypeVar("Value", float, "NDArray[float64]")


@dataclass(frozen=True)
class TaskScore(Generic[Value]):
    """A task's category, the mean `raw` of its items' scores in the metric's unit, and what guessing gives, 0 to 1."""

    category: str
    raw: Value
    chance: float
    unit: str = "share"

    @property
    def counted(self) -> bool:
        """Whether it enters the means: a cross-entropy has no scale from guessing to all right."""
        return self.unit == "share"

    @property
    def score(self) -> Value:
        """0 is guessing, 100 is all right, below 0 is worse than guessing; what enters no mean is as it is."""
        return normalise(self.raw, self.chance) if self.counted else self.raw


@dataclass(frozen=True)
class Summary(Generic[Value]):
    """The scores of one model, 0 to 100; None where there is no task to take them from.

    Attributes:
        categories: mean of each category's tasks.
        versatility: mean of those of gen_kn, gen_rs and instruct that have tasks.
        unified: w·speciality + (1 − w)·versatility.
    """

    categories: dict[str, Value | None]
    versatility: Value | None
    unified: Value | None

    @property
    def speciality(self) -> Value | None:
        """Mean of the speciality tasks."""
        return self.categories[SPECIALITY]

    @property
    def missing(self) -> tuple[str, ...]:
        """Categories without a task, which no mean counts as 0."""
        return tuple(name for name, value in self.categories.items() if value is None)

    def by_name(self) -> dict[str, Value | None]:
        """Every score under its name in `SUMMARIES`."""
        return {**self.categories, "versatility": self.versatility, "unified": self.unified}


def normalise(raw: Value, chance: float) -> Value:
    """s' = 100·(s − chance)/(1 − chance)."""
    return 100 * (raw - chance) / (1 - chance)


def summarise(tasks: Mapping[str, TaskScore[Value]], speciality_weight: float = 0.5) -> Summary[Value]:
    """Average the scores of the tasks that count (by title) into categories, those into versatility and unified."""
    categories = {
        name: _mean([t.score for t in tasks.values() if t.counted and t.category == name])
        for name in (SPECIALITY, *VERSATILITY)
    }
    speciality = categories[SPECIALITY]
    versatility = _mean([value for name in VERSATILITY if (value := categories[name]) is not None])
    unified = None
    if speciality is not None and versatility is not None:
        unified = speciality_weight * speciality + (1 - speciality_weight) * versatility
    return Summary(categories, versatility, unified)


def _mean(values: Sequence[Value]) -> Value | None:
    return reduce(operator.add, values) / len(values) if values else None
