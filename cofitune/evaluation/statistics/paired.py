"""Paired statistics: what several models scored on the same items, and how sure a difference between them is.

All models see the same resampled items in a draw (paired), items are resampled within each task (stratified), and every
draw goes through the whole account: task → category → versatility → unified.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cofitune.evaluation.metrics import Metric
from cofitune.evaluation.statistics.scores import Summary, TaskScore, Value, summarise

DRAWS = 10_000
CONFIDENCE = 0.95
SEED = 1234
LOST_BY = 0.5  # an item whose score got worse by this was lost: for right or wrong answers, what was right before
LOST_PART = 0.1  # for scores without a scale from 0 to 1, such as losses: by this part of the reference's mean
COIN_ITEMS = 2  # see Bootstrap
CELLS_AT_ONCE = 20_000_000  # of a chunk's draws × items, 8 bytes each

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TaskItems:
    """One task's items: `scores` [M, N] of M models on the same N items; `chance` is what guessing gives, 0 to 1."""

    category: str
    metric: Metric
    chance: float
    scores: Array

    @property
    def items(self) -> int:
        """How many items there are."""
        return int(self.scores.shape[1])

    @property
    def means(self) -> Array:
        """Each model's mean score [M]."""
        means: Array = self.scores.mean(axis=1)
        return means

    def changed(self, model: int, reference: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the items that the model lost against the reference, and of those that it gained.

        Drift has neither: no answer of the base is right or wrong, and its own drift, the measure of a change, is 0.
        """
        if self.metric.name in ("drift", "kl"):
            return (), ()
        better = self.scores[model] - self.scores[reference]
        better = better if self.metric.higher_is_better else -better
        by = LOST_BY if self.metric.unit == "share" else LOST_PART * abs(float(self.means[reference]))
        lost, gained = (np.flatnonzero((d != 0) & (d >= by)) for d in (-better, better))
        return tuple(map(int, lost)), tuple(map(int, gained))


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval contains 0: the value is not told apart from nothing."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Ratio:
    """A ratio in percent, or why there is none."""

    estimate: Estimate | None
    reason: str | None = None


@dataclass(frozen=True)
class TaskChange:
    """One task's change between two models.

    Attributes:
        change: of the 0–100 score, or of the figure of a task that enters no mean.
        lost, gained: indices of the items that got worse, or better: by `LOST_BY`; where there is no scale from 0 to 1,
            by `LOST_PART` of the mean before.
        p: exact McNemar test, two-sided; None where the task's items are not right or wrong.
        p_holm: `p` corrected for the tasks of this comparison (Holm).
    """

    change: Estimate
    lost: tuple[int, ...]
    gained: tuple[int, ...]
    p: float | None
    p_holm: float | None


class Bootstrap:
    """A joint bootstrap of all models: draws of every score, from which any difference or ratio takes its interval.

    Each task's draws are taken from its items and two more that every model gets right or wrong by a coin of its own
    (Agresti and Min 2005 add the same half an item to each cell of the paired table); their deviations from the mean
    are then those of the task's n items. Without them intervals of few discordant items cover too little, and those of
    none have no width (tests/evaluation/test_paired.py).
    """

    def __init__(
        self, tasks: Mapping[str, TaskItems], speciality_weight: float, draws: int = DRAWS, seed: int = SEED
    ) -> None:
        self.tasks, self.weight = dict(tasks), speciality_weight
        generator = np.random.default_rng(seed)
        drawn = {title: _draw_means(items, draws, generator) for title, items in self.tasks.items()}
        self._scores = {title: _task_score(t, t.means) for title, t in self.tasks.items()}
        self._drawn = {title: _task_score(t, drawn[title]) for title, t in self.tasks.items()}
        self._summary = summarise(self._scores, speciality_weight).by_name()
        self._summary_drawn = summarise(self._drawn, speciality_weight).by_name()

    def task_scores(self, model: int) -> dict[str, TaskScore[float]]:
        """One model's task scores as they are, by title."""
        return {title: _task_score(t, float(t.means[model])) for title, t in self.tasks.items()}

    def summary(self, model: int) -> Summary[float]:
        """One model's scores as they are."""
        return summarise(self.task_scores(model), self.weight)

    def draws(self, name: str) -> tuple[Array, Array] | None:
        """A summary score of all models as it is [M], and in every draw [D, M]; None where there is no task."""
        values, drawn = self._summary[name], self._summary_drawn[name]
        return None if values is None or drawn is None else (values, drawn)

    def task_draws(self, title: str) -> tuple[Array, Array]:
        """A task's score of all models as it is [M], and in every draw [D, M]."""
        return self._scores[title].score, self._drawn[title].score

    def change(self, name: str, model: int, reference: int) -> Estimate | None:
        """Change of a summary score (`SUMMARIES`) from the reference to the model; None where there is no task."""
        drawn = self.draws(name)
        return None if drawn is None else _change(*drawn, model, reference)

    def task_change(self, title: str, model: int, reference: int) -> Estimate:
        """Change of a task's score from the reference to the model."""
        return _change(*self.task_draws(title), model, reference)

    def ratio(self, name: str, above: tuple[int, int | None], below: tuple[int, int | None], what: str) -> Ratio:
        """100·(a − b)/(c − d) of a summary score for `above` = (a, b) and `below` = (c, d); None stands for 0.

        Args:
            what: the denominator in words, for the reason why there is no ratio.
        """
        if (known := self.draws(name)) is None:
            return Ratio(None, "there is no task to take it from")
        values, drawn = known
        bottom_drawn = _minus(drawn.T, below)
        bottom = estimate(float(_minus(values, below)), bottom_drawn)
        if bottom.holds_zero:
            return Ratio(
                None,
                f"{what} is {bottom.value:.1f} points (interval {bottom.low:.1f} to {bottom.high:.1f}), not told apart "
                "from 0",
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            quotients = 100 * _minus(drawn.T, above) / bottom_drawn
        return Ratio(estimate(100 * float(_minus(values, above)) / bottom.value, quotients))


def compare_tasks(bootstrap: Bootstrap, model: int, reference: int) -> dict[str, TaskChange]:
    """Each task's change from the reference to the model, by title, tested per task and corrected over all of them."""
    results = {}
    for title, items in bootstrap.tasks.items():
        lost, gained = items.changed(model, reference)
        p = mcnemar(len(lost), len(gained)) if items.metric.binary else None
        results[title] = (bootstrap.task_change(title, model, reference), lost, gained, p)
    corrected = holm({title: p for title, (_, _, _, p) in results.items() if p is not None})
    return {
        title: TaskChange(change, lost, gained, p, corrected.get(title))
        for title, (change, lost, gained, p) in results.items()
    }


@lru_cache(maxsize=10_000)  # a simulation asks for the same few pairs thousands of times
def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the p-value of `lost` and `gained` items where both are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number, holding the family-wise error rate (Holm 1979)."""
    corrected, so_far = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = so_far
    return corrected


def seed_noise(groups: Sequence[Sequence[Mapping[str, float | None]]]) -> dict[str, float]:
    """Standard deviation of each score over training seeds, pooled over groups of runs that differ in the seed only.

    Args:
        groups: each with two or more runs' scores by name; a score that any run lacks is left out.
    """
    freedom = sum(len(group) - 1 for group in groups)
    pooled = {}
    for name in groups[0][0]:
        values = [[value for run in group if (value := run.get(name)) is not None] for group in groups]
        if [len(v) for v in values] == [len(group) for group in groups]:
            squares = sum((len(v) - 1) * statistics.variance(v) for v in values)
            pooled[name] = (squares / freedom) ** 0.5
    return pooled


def noise_limit(deviation: float, freedom: int, runs: int, *, both_trained: bool) -> float:
    """How far apart two scores lie in 95 % of cases where nothing but the training seed differs.

        t(0.975, freedom) · s · √2           between two trained runs
        t(0.975, freedom) · s · √(1 + 1/n)   between a trained run and the base, which no seed moves

    One standard deviation alone is exceeded by pure noise about every second time with two seeds.

    Args:
        deviation: standard deviation s over seeds, as `seed_noise` gives it.
        freedom: its degrees of freedom, runs less groups.
        runs: n, of the smallest group.
    """
    spread = 2.0 if both_trained else 1 + 1 / runs
    return float(_student(freedom) * deviation * spread**0.5)


@lru_cache(maxsize=1000)
def _student(freedom: int) -> float:
    """Student's t beyond which lies what `CONFIDENCE` leaves, on both sides together."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _task_score(items: TaskItems, raw: Value) -> TaskScore[Value]:
    return TaskScore(items.category, raw, items.chance, items.metric.unit)


def _draw_means(items: TaskItems, draws: int, generator: np.random.Generator) -> Array:
    """Means [D, M] over resampled items, centred on the true means.

    Items on which all models scored alike are exchangeable, so a draw counts the patterns and not the items: the same
    distribution, and four patterns instead of thousands of items for two models of binary scores. Scores without a
    scale from 0 to 1 have no coin.
    """
    patterns, counts = np.unique(items.scores, axis=1, return_counts=True)  # [M, P], [P]
    coins = COIN_ITEMS if items.metric.unit == "share" else 0
    total = items.items + coins
    weights = np.append(counts, coins) / total
    chunk = max(1, CELLS_AT_ONCE // len(weights))
    drawn = []
    for start in range(0, draws, chunk):
        times = generator.multinomial(total, weights, min(chunk, draws - start))  # [D, P + 1]
        heads = generator.binomial(times[:, -1:], 0.5, (len(times), len(patterns)))
        drawn.append(times[:, :-1] @ patterns.T + heads)
    return items.means + (np.concatenate(drawn) - counts @ patterns.T - coins / 2) / items.items


def estimate(value: float, drawn: Array, confidence: float = CONFIDENCE) -> Estimate:
    """A value with the interval that its draws [D] give; those that are no number are left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _change(values: Array, drawn: Array, model: int, reference: int) -> Estimate:
    return estimate(float(values[model] - values[reference]), drawn[:, model] - drawn[:, reference])


def _minus(values: Array, pair: tuple[int, int | None]) -> Array:
    first, second = pair
    result: Array = values[first] - (0.0 if second is None else values[second])
    return result
