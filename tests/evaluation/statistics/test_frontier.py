"""Frontiers against brute force and against curves whose answers are known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cofitune.evaluation.statistics.frontier import Array, at_level, dominated_by, frontier, place, seed_weights


def brute_force(points: list[tuple[float, float]], level: float) -> float | None:
    """The highest versatility at a level, by the definition: walk the points that none dominates."""
    if not min(s for s, _ in points) <= level <= max(s for s, _ in points):
        return None
    best = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    best = sorted(set(best))
    if level <= best[0][0]:
        return best[0][1]
    for (s0, v0), (s1, v1) in pairwise(best):
        if s0 <= level <= s1:
            return v0 + (v1 - v0) * (level - s0) / (s1 - s0)
    raise AssertionError("the last point of a frontier has the highest speciality of all")


def value(points: list[tuple[float, float]], level: float) -> float:
    speciality, versatility = (np.array([p[n] for p in points])[None] for n in (0, 1))
    scores = {"speciality": speciality, "versatility": versatility}
    return float(at_level(scores, np.array([level]))["versatility"][0])


@pytest.mark.parametrize("seed", range(40))
def test_a_frontier_is_what_the_definition_says(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    # whole numbers, so that points share coordinates and some are equal
    points = [(float(s), float(v)) for s, v in generator.integers(0, 7, (count, 2))]
    speciality, versatility = (np.array([p[n] for p in points]) for n in (0, 1))
    kept = frontier(speciality, versatility)
    undominated = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    assert [points[i] for i in kept] == sorted(set(undominated))
    for index, by in enumerate(dominated_by(speciality, versatility)):
        assert (by is None) == (points[index] in undominated)
        if by is not None:
            assert points[by][0] >= points[index][0] and points[by][1] >= points[index][1] != points[by]
    for level in np.arange(-0.5, 7.5, 0.25):
        expected, result = brute_force(points, float(level)), value(points, float(level))
        assert np.isnan(result) if expected is None else result == pytest.approx(expected)


def test_draws_are_taken_one_by_one() -> None:
    """Each row of [D, P] has a frontier, and a level, of its own."""
    generator = np.random.default_rng(7)
    speciality, versatility = generator.normal(size=(2, 50, 6))
    level = generator.normal(size=50)
    scores: dict[str, Array] = {"speciality": speciality, "versatility": versatility, "other": 2 * versatility + 1}
    result = at_level(scores, level)
    for row in range(50):
        expected = brute_force(list(zip(speciality[row], versatility[row], strict=True)), float(level[row]))
        if expected is None:
            assert np.isnan(result["versatility"][row])
        else:
            assert result["versatility"][row] == pytest.approx(expected)
            assert result["other"][row] == pytest.approx(2 * expected + 1), "one place for all scores"


def test_known_curves() -> None:
    points = [(0.0, 10.0), (20.0, 8.0), (40.0, 2.0), (30.0, 4.0)]  # the last lies under the line and counts still
    assert [value(points, level) for level in (0, 10, 20, 25, 30, 35, 40)] == [10, 9, 8, 6, 4, 3, 2]
    assert np.isnan(value(points, 40.1)) and np.isnan(value(points, -0.1))
    speciality, versatility = (np.array([[p[n] for p in points]]) for n in (0, 1))
    left, right, weight = place(speciality, versatility, np.array([25.0]))
    assert (left[0], right[0], weight[0]) == (1, 3, 0.5)
    assert value([(0.0, 5.0), (10.0, 7.0)], 3) == 7, "who learnt more and forgot less has what is wanted"


def test_seeds_are_resampled_with_replacement() -> None:
    assert (seed_weights(1, 5, 0) == 1).all()
    weights = seed_weights(3, 4000, 0)
    assert weights.sum(axis=1) == pytest.approx(1) and weights.mean(axis=0) == pytest.approx(1 / 3, abs=0.02)
    assert {round(w, 3) for w in weights.flatten()} == {-0.075, 0.333, 0.742, 1.15}, "spread around 1/3"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_mean_over_seeds_varies_as_the_seeds_do(seeds: int) -> None:
    """The variance of a mean is the unbiased one of its values by their number, also of two."""
    values = np.arange(seeds) ** 2.0
    drawn = seed_weights(seeds, 40_000, 1) @ values
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.1)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / seeds, rel=0.05)
