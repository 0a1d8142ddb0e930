"""Methods as curves: the best versatility that each gives at every speciality, and how far apart two curves are.

A method's points are what its rates and alphas reach. Its **frontier** is the points that no other of its points
dominates (at least as good in both scores, and better in one), joined by straight lines; below its first point it goes
on level, as far as the method has points, for who has more speciality than wanted lacks nothing. Outside of its
points' range a method says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SUBSETS = 24


def frontier(speciality: Array, versatility: Array) -> list[int]:
    """Indices of the points [P] that none dominates, by ascending speciality; of equal ones the first.

    Example:
        >>> frontier(np.array([10.0, 30.0, 20.0]), np.array([50.0, 40.0, 30.0]))
        [0, 1]
    """
    order, kept = _ordered(speciality[None], versatility[None])
    return [int(index) for index in order[0][kept[0]]][::-1]


def dominated_by(speciality: Array, versatility: Array) -> list[int | None]:
    """For each point the one that dominates it with the most versatility, or None."""
    results: list[int | None] = []
    for index in range(len(speciality)):
        as_good = (speciality >= speciality[index]) & (versatility >= versatility[index])
        better = as_good & ((speciality > speciality[index]) | (versatility > versatility[index]))
        results.append(int(np.argmax(np.where(better, versatility, -np.inf))) if better.any() else None)
    return results


def place(speciality: Array, versatility: Array, level: Array) -> tuple[NDArray[np.intp], NDArray[np.intp], Array]:
    """Where a frontier is met at a level of speciality, draw by draw.

    Args:
        speciality, versatility: of a method's points, [D, P].
        level: [D].

    Returns:
        Each [D]: the two points between which the level lies (twice the same on a point), and the weight in [0, 1] of
        the second; NaN where the level lies outside of the method's range.
    """
    order, kept = _ordered(speciality, versatility)
    ordered = np.take_along_axis(speciality, order, axis=1)  # descending
    above, below = kept & (ordered >= level[:, None]), kept & (ordered <= level[:, None])
    last = above.shape[1] - 1 - np.argmax(above[:, ::-1], axis=1)
    first = np.where(below.any(axis=1), np.argmax(below, axis=1), last)
    high, low = (np.take_along_axis(ordered, which[:, None], axis=1)[:, 0] for which in (last, first))
    apart = high > low
    weight = np.where(apart, (level - low) / np.where(apart, high - low, 1.0), 0.0)
    inside = above.any(axis=1) & (speciality.min(axis=1) <= level)
    left, right = (np.take_along_axis(order, which[:, None], axis=1)[:, 0] for which in (first, last))
    return left, right, np.where(inside, weight, np.nan)


def at_level(scores: Mapping[str, Array], level: Array) -> dict[str, Array]:
    """Every score of a method at a level of speciality, on the line between the two points of its frontier.

    Args:
        scores: name → [D, P], `speciality` and `versatility` among them, which alone make the frontier.
        level: [D].

    Returns:
        Name → [D]; NaN where the level lies outside of the method's range.
    """
    left, right, weight = place(scores["speciality"], scores["versatility"], level)
    rows = np.arange(len(level))
    return {name: (1 - weight) * values[rows, left] + weight * values[rows, right] for name, values in scores.items()}


def subsets(count: int, size: int, always: int, seed: int) -> list[NDArray[np.intp]]:
    """Choices of `size` among a method's points 1 … `count`, each with the base (0) before them, ascending.

    All of them where there are at most `SUBSETS`, else so many drawn at random.

    Args:
        always: a point that every choice holds.
    """
    others = [point for point in range(1, count + 1) if point != always]
    if size >= count:
        chosen: list[tuple[int, ...]] = [tuple(others)]
    elif comb(len(others), size - 1) <= SUBSETS:
        chosen = list(combinations(others, size - 1))
    else:
        generator = np.random.default_rng(seed)
        chosen = [tuple(generator.choice(others, size - 1, replace=False).tolist()) for _ in range(SUBSETS)]
    return [np.array(sorted({0, always, *one})) for one in chosen]


def at_level_of_fewer(scores: Mapping[str, Array], level: Array, size: int, always: int, seed: int) -> dict[str, Array]:
    """As `at_level`, of a frontier that has only `size` of the method's points: the mean over `subsets` of them.

    The best of many noisy points is luckier than the best of few: of equal methods one with 12 points is ahead of one
    with 4 by about half of a point's noise (tests/evaluation/statistics/test_fewer.py). With equally many points both
    are equally lucky.

    Args:
        scores: name → [D, P + 1], the base first.
        always: a point that every choice holds, so that it reaches the level: of the highest speciality that was
            measured, of which draws may have another one.
    """
    count = scores["speciality"].shape[1] - 1
    parts = [
        at_level({name: values[:, which] for name, values in scores.items()}, level)
        for which in subsets(count, size, always, seed)
    ]
    return {name: np.mean([part[name] for part in parts], axis=0) for name in scores}


def seed_weights(seeds: int, draws: int, seed: int) -> Array:
    """How much each training seed counts in a draw [D, S]: seeds resampled with replacement, the same for all methods.

    The mean of S values drawn with replacement varies by (S − 1)/S of what it should: the values lie around their own
    mean, not around that of all trainings. With two or three seeds intervals would be much too narrow, so that the
    weights are spread around 1/S by √(S/(S − 1)); one may be negative then, their sum stays 1.
    With one seed there is nothing to resample, and an interval is over items alone.
    """
    generator = np.random.default_rng(seed)
    weights: Array = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    return weights if seeds == 1 else 1 / seeds + (weights - 1 / seeds) * sqrt(seeds / (seeds - 1))


def _ordered(speciality: Array, versatility: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The points by descending speciality, of equals the more versatile first; which of them are on the frontier."""
    by_versatility = np.argsort(-versatility, axis=1, kind="stable")
    by_both = np.argsort(-np.take_along_axis(speciality, by_versatility, axis=1), axis=1, kind="stable")
    order = np.take_along_axis(by_versatility, by_both, axis=1)
    ordered = np.take_along_axis(versatility, order, axis=1)
    best = np.maximum.accumulate(ordered, axis=1)
    return order, np.concatenate([np.ones((len(order), 1), bool), ordered[:, 1:] > best[:, :-1]], axis=1)
