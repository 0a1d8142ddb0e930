"""How far a training seed moves what decides a search: the same regions trained with several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from cofitune.search.proxy import rank_correlation

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Reliability:
    """What several seeds of a sample of regions say.

    Attributes:
        seeds: of each region in the sample.
        regions: ids of the sample's trials with the first seed.
        correlation: Spearman's between two seeds over the regions that have both, the mean over all pairs of seeds;
            None for fewer than three regions.
        deviation: standard deviation of one training, pooled over the sample; None where no region has two figures.
        freedom: its degrees of freedom.
        means: of each finished region, over the seeds that it has figures of.
        counts: how many those are.
    """

    seeds: tuple[int, ...]
    regions: tuple[str, ...]
    correlation: float | None
    deviation: float | None
    freedom: int
    means: dict[str, float]
    counts: dict[str, int]

    @property
    def standard_error(self) -> float | None:
        """Of a region's mean over all seeds."""
        return None if self.deviation is None else self.deviation / len(self.seeds) ** 0.5

    def ties(self, winner: str, confidence: float = CONFIDENCE) -> tuple[str, ...]:
        """Regions whose mean is not told from the winner's, by a t-interval with the pooled deviation."""
        if self.deviation is None or winner not in self.means:
            return ()
        from scipy.stats import t

        reach = float(t.ppf((1 + confidence) / 2, self.freedom)) * self.deviation

        def within(region: str) -> bool:
            spread = (1 / self.counts[winner] + 1 / self.counts[region]) ** 0.5
            return bool(abs(self.means[region] - self.means[winner]) <= reach * spread)

        return tuple(region for region in self.means if region != winner and within(region))


def judge_seeds(values: Mapping[str, Sequence[float | None]], seeds: Sequence[int]) -> Reliability:
    """Compare seeds.

    Args:
        values: by region's id what decides, a figure a seed in the order of `seeds`, None where there is none; a region
            outside the sample has those of the first seeds alone.
    """
    sample = {region: own for region, own in values.items() if len(own) == len(seeds)}
    pairs = []
    for first, second in combinations(range(len(seeds)), 2):
        both = [(own[first], own[second]) for own in values.values() if len(own) > second]
        known = [(a, b) for a, b in both if a is not None and b is not None]
        pairs.append(rank_correlation([a for a, _ in known], [b for _, b in known]))
    found = [value for value in pairs if value is not None]
    known_values = {region: [v for v in own if v is not None] for region, own in values.items()}
    several = [own for own in known_values.values() if len(own) > 1]
    freedom = sum(len(own) - 1 for own in several)
    squares = sum((len(own) - 1) * statistics.variance(own) for own in several)
    return Reliability(
        seeds=tuple(seeds),
        regions=tuple(sample),
        correlation=statistics.fmean(found) if found else None,
        deviation=(squares / freedom) ** 0.5 if freedom else None,
        freedom=freedom,
        means={region: statistics.fmean(own) for region, own in known_values.items() if own},
        counts={region: len(own) for region, own in known_values.items() if own},
    )
