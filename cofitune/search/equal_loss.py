"""What decides a search under `measure: loss`: the drift at equal speciality loss.

A small region learns slower than a large one, so that after as many steps it has also drifted less. Each trial is
therefore measured a few times along its training, and all are compared where they have learnt equally much:

- The best trial's gain is how far the lowest speciality loss of all lies below the base's. Trials that made at least
  `reach` of it are compared; the common loss is the highest of their lowest losses, which all of them come down to.
- They rank by their drift there (lower is better), by interpolation between the measurements. Those within `tolerance`
  of the least count as equal to it, since another seed moves a drift by more. Of them the fewest weights come first; up
  to a quarter more count as as few, since quarters of 30 layers have 7 or 8, and of those the one that has learnt most.
- Trials that made less rank behind them, by the lowest loss they came to. Where no trial gained, all rank so.

The common loss depends on which trials stand beside each other: those of a level for what is expanded, all finished
ones for the winner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cofitune.search.measured import CurvePoint, drift_at, lowest_loss
from cofitune.search.trial import Trial

UNIT = "nats a token"
AS_FEW = 1.25  # times the fewest weights


@dataclass(frozen=True)
class EqualLoss:
    """How trials are ranked.

    Attributes:
        base: the measured base, which gains are counted from.
        reach: part of the best trial's gain that a trial must make to be compared, 0 to 1.
        tolerance: part of the least drift by which another may be above it and count as equal.
    """

    base: Trial
    reach: float = 0.5
    tolerance: float = 0.0
    score = "drift"
    floor = None

    def common_loss(self, trials: Sequence[Trial]) -> float | None:
        """The speciality loss at which these trials are compared, in nats a token; None where none has gained."""
        begin = self.base.curve[0].loss
        lowest = [lowest_loss(trial.curve) for trial in trials if trial.curve]
        gain = begin - min(lowest, default=begin)
        if gain <= 0:
            return None
        # a hair of slack: the best trial itself must not miss its own gain by rounding
        return max(loss for loss in lowest if begin - loss >= self.reach * gain - 1e-12)

    def drift_of(self, trial: Trial, common: float | None) -> float | None:
        """A trial's drift at the common loss; None where it does not come so far."""
        return None if common is None else drift_at(self._curve(trial), common)

    def order(self, trials: Sequence[Trial]) -> list[Trial]:
        """These trials, the best first; what else is alike goes by fewer weights, then by the lower first layer."""
        common = self.common_loss(trials)
        drifts = {trial.id: drift for trial in trials if (drift := self.drift_of(trial, common)) is not None}
        equal = self.equal_up_to(list(drifts.values()))
        few = AS_FEW * min((t.num_trained for t in trials if drifts.get(t.id, math.inf) <= equal), default=0)

        def rank(trial: Trial) -> tuple[object, ...]:
            drift = drifts.get(trial.id)
            loss = lowest_loss(trial.curve) if trial.curve else math.inf
            if drift is None:
                first: tuple[float, ...] = (1, loss)
            elif drift > equal:
                first = (0, drift)
            else:
                first = (0, -math.inf, *((0, loss) if trial.num_trained <= few else (1,)))
            region = trial.region
            return (*first, trial.num_trained, *((region.layers, region.modules) if region else ((), ())))

        return sorted(trials, key=rank)

    def equal_up_to(self, drifts: Sequence[float]) -> float:
        """The highest drift that counts as equal to the least of these, in nats a token."""
        least = min(drifts, default=-math.inf)
        return least * (1 + self.tolerance) if least > 0 else least

    def ranks(self, trials: Sequence[Trial]) -> list[float]:
        """A figure for each, high is good, of which only the order means something."""
        places = {trial.id: place for place, trial in enumerate(self.order(trials))}
        return [-float(places[trial.id]) for trial in trials]

    def shortfall(self, trial: Trial) -> float:
        """There is no floor to miss."""
        return 0.0

    def _curve(self, trial: Trial) -> Sequence[CurvePoint]:
        return (*self.base.curve[:1], *trial.curve)
