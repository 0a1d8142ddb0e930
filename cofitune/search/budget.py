"""What a search may cost, in hours and in trials: nothing is started that would not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cofitune.search.store import Store
from cofitune.search.trial import BASE, Trial

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class Part:
    """What is to be run of a trial: from a step (0: the beginning) to a step."""

    id: str
    start_step: int
    steps: int


@dataclass(frozen=True)
class Budget:
    """The limits of a search, over all of its calls.

    Attributes:
        hours: of trials, the base's evaluation and failed attempts included; where several run at once, their sum. Not
            in it: what a Ray trial had done when its worker was lost, which nobody tells.
        trials: how many may be begun; a second try or a further part of one is no further trial.
        at_once: how many parts may be begun before the time that they took is looked at; None: as many as fit.
    """

    hours: float | None = None
    trials: int | None = None
    at_once: int | None = 1

    def admit(self, parts: Sequence[Part], store: Store, reserve: int = 0) -> int:
        """How many of these parts, from the first on, may be run now.

        Args:
            parts: what the search wants next, the most wanted first.
            store: what was run so far.
            reserve: steps that must still fit beside them, so that a search whose trials are all paused can finish one.
        """
        begun = {trial.id for trial in store.trials()} - {BASE}
        count, left = 0, self.seconds_left(store)
        expected = Expected.of(store)
        if left is not None and expected is not None and reserve:
            left -= expected.seconds(reserve)
        for part in parts:
            new = part.id not in begun
            if new and self.trials is not None and len(begun) >= self.trials:
                break
            if left is not None:
                if self.at_once is not None and count == self.at_once:
                    break
                if left <= 0 or (expected is None and count):
                    break
                left -= expected.seconds(part.steps - part.start_step) if expected else 0.0
                if left < 0:
                    break
            begun.add(part.id)
            count += 1
        return count

    def seconds_left(self, store: Store) -> float | None:
        """What is left of the hours; None where there is no such limit."""
        return None if self.hours is None else self.hours * SECONDS_AN_HOUR - store.seconds()

    def why_ended(self, store: Store) -> str:
        """The limit that leaves no room for another trial, in words."""
        begun = {trial.id for trial in store.trials()} - {BASE}
        if self.trials is not None and len(begun) >= self.trials:
            return f"search.budget_trials: {self.trials}"
        return f"search.budget_hours: {self.hours:g} ({store.seconds() / SECONDS_AN_HOUR:.2f} spent)"


@dataclass(frozen=True)
class Expected:
    """What a part of a trial takes by the mean of those that ended with scores.

    Attributes:
        a_step: seconds of one optimizer step.
        besides: seconds of all else in a part: the evaluation, mostly.
    """

    a_step: float
    besides: float

    @classmethod
    def of(cls, store: Store) -> Expected | None:
        """The means over the store's parts; None before the first has ended."""
        parts = [line for line in store.lines() if _tells(line)]
        if not parts:
            return None
        steps = sum(line.steps - line.start_step for line in parts)
        training = sum(_training(line) for line in parts)
        whole = sum(line.seconds for line in parts)
        return cls(training / steps, (whole - training) / len(parts))

    def seconds(self, steps: float, parts: float = 1) -> float:
        """Of so many optimizer steps in so many parts."""
        return steps * self.a_step + parts * self.besides


def _tells(line: Trial) -> bool:
    """Whether a line is of a part that was trained and scored (a stopped trial's repeats the one before)."""
    return line.region is not None and line.status in ("done", "paused") and line.steps > line.start_step


def _training(line: Trial) -> float:
    """Seconds of a part's training; where they were not told apart, all of it counts as such."""
    return line.parts.get("train", line.seconds)
