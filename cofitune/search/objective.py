"""What decides a search: the unified score, or one of its halves among the regions that keep enough of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cofitune.search.trial import Trial

Score = Literal["unified", "speciality", "versatility"]
OTHER: dict[str, Score] = {"speciality": "versatility", "versatility": "speciality"}


@dataclass(frozen=True)
class Objective:
    """How trials are ranked.

    Attributes:
        score: what is to be high.
        floor: points of change against the base that the other score must keep; None: there is no such condition.
        base: the scored base, which changes are counted from; needed for a floor.
    """

    score: Score = "unified"
    floor: float | None = None
    base: Trial | None = None

    @property
    def kept(self) -> Score | None:
        """The score that the floor is for."""
        return None if self.floor is None else OTHER[self.score]

    def value(self, trial: Trial) -> float:
        """The deciding score, 0 to 100; minus infinity where a trial has none."""
        value = getattr(trial, self.score)
        return -math.inf if value is None else float(value)

    def change(self, trial: Trial) -> float | None:
        """What became of the score that the floor is for, in points against the base; None where it is unknown."""
        if self.kept is None or self.base is None:
            return None
        now, before = getattr(trial, self.kept), getattr(self.base, self.kept)
        return None if now is None or before is None else float(now - before)

    def shortfall(self, trial: Trial) -> float:
        """Points by which a trial misses the floor; 0 where it keeps it or there is none."""
        if self.floor is None:
            return 0.0
        change = self.change(trial)
        return math.inf if change is None else max(0.0, self.floor - change)

    def order(self, trials: Sequence[Trial]) -> list[Trial]:
        """These trials, the best first."""
        return sorted(trials, key=self.rank)

    def ranks(self, trials: Sequence[Trial]) -> list[float]:
        """A figure for each, high is good, of which only the order means something."""
        return [self.value(trial) for trial in trials]

    def rank(self, trial: Trial) -> tuple[object, ...]:
        """Sorting key of trials with scores, best first.

        Those that miss the floor come last, the nearest to it first of them. Then the higher deciding score; of equals
        the one with fewer trained weights, then the lower first layer (the last parts only make the order total).
        """
        region = trial.region
        place = (region.layers, region.modules) if region else ((), ())
        return (self.shortfall(trial), -self.value(trial), trial.num_trained, *place)


class Ranking(Protocol):
    """What a search goes by: `Objective` for scores, `EqualLoss` for losses and drift.

    Attributes:
        score: the name of what decides.
        floor: points of change against the base that the other score must keep; None: there is no such condition.
        base: the scored base.
    """

    @property
    def score(self) -> str: ...

    @property
    def floor(self) -> float | None: ...

    @property
    def base(self) -> Trial | None: ...

    def order(self, trials: Sequence[Trial]) -> list[Trial]:
        """These trials, the best first."""

    def ranks(self, trials: Sequence[Trial]) -> list[float]:
        """A figure for each, high is good, of which only the order means something."""

    def shortfall(self, trial: Trial) -> float:
        """By how much a trial misses the floor; 0 where it keeps it or there is none."""
