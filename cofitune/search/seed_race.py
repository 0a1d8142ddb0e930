"""Further seeds where they decide: leaders that tie get another one, those that are worse beyond chance drop out.

Successive elimination (Even-Dar, Mannor and Mansour, 2006) over training seeds, after successive halving over steps
(`halving.py`): every round trains each region that is still in with the same next seed. A region drops out where the
difference of its mean to the best one's lies outside a t-interval with the deviation of one training, pooled over all
of them. There are several looks at several regions, so the interval is that of 95 % for all of them together
(Bonferroni). A region without a figure under some seed, which the others have, drops out, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cofitune.search.repeat import CONFIDENCE, judge_seeds

Values = Mapping[str, Sequence[float | None]]  # by region's id a figure a seed, as far as it was trained


@dataclass(frozen=True)
class SeedRace:
    """How a race ended.

    Attributes:
        left: regions that are still in, at least one.
        reason: why it ended, in words.
    """

    left: tuple[str, ...]
    reason: str


def race_seeds(
    candidates: Sequence[str],
    seeds: Sequence[int],
    train: Callable[[Sequence[str], int], str | None],
    values: Callable[[], Values],
    *,
    lower_is_better: bool,
) -> SeedRace:
    """Train rounds of seeds until one region is left.

    Args:
        candidates: regions that have one seed each, at least one.
        seeds: further ones, a round each, as far as it comes to them.
        train: trains these regions with a seed; says which limit left no room for all of them, if one did.
        values: the figures so far, of all candidates.
    """
    left = tuple(candidates)
    for seed in seeds:
        if len(left) == 1:
            break
        limit = train(left, seed)
        left = still_in(values(), left, len(candidates), len(seeds), lower_is_better)
        if limit:
            return SeedRace(left, limit)
    if len(left) == 1:
        return SeedRace(left, "one region is left")
    return SeedRace(left, f"search.repeat_most: {len(seeds) + 1}")


def still_in(
    values: Values, left: Sequence[str], candidates: int, looks: int, lower_is_better: bool
) -> tuple[str, ...]:
    """Those of the regions left that are not worse than the best beyond chance.

    Args:
        candidates: how many regions the race began with.
        looks: at how many times it may be asked.
    """
    whole = [region for region in left if None not in values[region]]
    if not whole:
        return tuple(left)
    judged = judge_seeds(values, range(max(map(len, values.values()))))
    best = sorted(whole, key=lambda region: judged.means[region] * (1 if lower_is_better else -1))[0]
    confidence = 1 - (1 - CONFIDENCE) / (looks * max(1, candidates - 1))
    tied = {best, *judged.ties(best, confidence)} if judged.deviation is not None else set(whole)
    return tuple(region for region in whole if region in tied)
