"""Successive halving: all candidates of a level are trained a few steps, and only the best of them continue.

After Jamieson and Talwalkar (arXiv 1502.07943), with the learning rate schedule of the whole trial, so that what goes
on ends with the bits that it would have had without the pause. A trial is compared at a step with the others at the
same step, and with nothing else: the score of 15 steps says little about that of 60, but something about who leads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cofitune.search.item_scores import Difference
from cofitune.search.objective import Ranking
from cofitune.search.trial import Trial

Compare = Callable[[Trial, Trial], Difference | None]  # of the deciding score, the first minus the second


def share_of(share: float, count: int) -> int:
    """A share of a number of candidates, rounded up.

    Example:
        >>> share_of(0.25, 9)
        3
    """
    return math.ceil(share * count - 1e-9)  # 0.1 · 30 is a little more than 3 in binary


@dataclass(frozen=True)
class SuccessiveHalving:
    """When candidates are compared, and how many continue.

    Attributes:
        steps: optimizer steps, ascending, all below a trial's last.
        keep: share of the candidates at a step that continues.
        early_stop: whether what is worse than the best beyond chance goes, too.
    """

    steps: tuple[int, ...]
    keep: float = 0.5
    early_stop: bool = True

    def most_after(self, count: int, beam: int) -> int:
        """How many of so many candidates go on at most."""
        return min(count, max(beam, share_of(self.keep, count)))

    def spare_all(self, count: int, beam: int) -> bool:
        """Whether all of so many candidates would continue, so that scoring them on the way is for nothing."""
        return count <= beam or (not self.early_stop and self.most_after(count, beam) == count)

    def prune(
        self, scored: Sequence[Trial], step: int, *, beam: int, objective: Ranking, compare: Compare
    ) -> dict[str, str]:
        """Which candidates stop at this step, by id, and why. At least `beam` continue.

        Args:
            scored: the level's candidates as they were scored at this step.
        """
        order = objective.order(scored)
        most = self.most_after(len(order), beam)
        stopped = {
            trial.id: f"number {place} of {len(order)} after {step} steps, of which {most} may go on"
            for place, trial in enumerate(order[most:], start=most + 1)
        }
        if not self.early_stop or not order or objective.shortfall(order[0]):
            return stopped
        for trial in order[max(1, beam) : most]:
            behind = compare(trial, order[0])
            if behind is not None and behind.high < 0:
                stopped[trial.id] = (
                    f"after {step} steps {objective.score} is {-behind.value:.1f} points below the best "
                    f"(95 % interval of the difference {behind.low:.1f} to {behind.high:.1f})"
                )
        return stopped
