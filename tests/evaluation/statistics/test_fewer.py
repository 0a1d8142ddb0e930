"""Frontiers of equally many points: equal methods with 4 and 12 points are rarely told apart."""

from __future__ import annotations

import numpy as np
import pytest

from cofitune.evaluation.statistics.frontier import Array, at_level, at_level_of_fewer, seed_weights, subsets

DRAWS, LEVEL, NOISE_OF_SEEDS, NOISE_OF_ITEMS = 300, 60.0, 1.0, 1.1
Method = tuple[dict[str, Array], dict[str, Array]]


def test_every_choice_has_the_base_and_the_point_that_learnt_most() -> None:
    few = [tuple(choice) for choice in subsets(4, 2, 3, seed=0)]
    assert sorted(few) == [(0, 1, 3), (0, 2, 3), (0, 3, 4)]
    assert [tuple(choice) for choice in subsets(3, 3, 2, seed=0)] == [(0, 1, 2, 3)]
    many = subsets(12, 4, 12, seed=0)
    assert len(many) == 24 and all(len(one) == 5 and {0, 12} <= set(one.tolist()) for one in many)
    assert [one.tolist() for one in many] == [one.tolist() for one in subsets(12, 4, 12, seed=0)]


def test_the_mean_over_all_choices_is_that_of_frontiers_made_one_by_one() -> None:
    generator = np.random.default_rng(0)
    speciality, versatility = np.sort(generator.random((5, 5)), axis=1), generator.random((5, 5))
    level = speciality.mean(axis=1)
    expected = []
    for pair in ((1, 4), (2, 4), (3, 4)):
        which = [0, *pair]
        scores = {"speciality": speciality[:, which], "versatility": versatility[:, which]}
        expected.append(at_level(scores, level)["versatility"])
    found = at_level_of_fewer({"speciality": speciality, "versatility": versatility}, level, 2, 4, seed=0)
    np.testing.assert_allclose(found["versatility"], np.mean(expected, axis=0))


def simulate(
    points: int, seeds: int, slope: float, common: tuple[float, Array], generator: np.random.Generator
) -> Method:
    """A method whose true frontier is a line, measured with the noise of its seeds and items, and its draws."""
    speciality = np.array([0.0, *np.linspace(20, 90, points)])
    truth = 50 - slope * (speciality - 20) / 70
    items = np.array([0.0, *generator.normal(0, NOISE_OF_ITEMS, points)])
    trained = generator.normal(0, NOISE_OF_SEEDS, (points + 1, seeds))
    measured = (truth + items)[:, None] + trained + common[0]
    drawn = np.einsum("ps,ds->dp", measured, seed_weights(seeds, DRAWS, 7)) + common[1][:, None]
    drawn[:, 1:] += generator.normal(0, NOISE_OF_ITEMS, (DRAWS, points))
    moved = speciality + generator.normal(0, 0.8, (DRAWS, points + 1))
    return (
        {"speciality": speciality[None], "versatility": measured.mean(axis=1)[None]},
        {"speciality": moved, "versatility": drawn},
    )


@pytest.mark.parametrize(("seeds", "slope"), [(2, 0.0), (2, 8.0), (3, 0.0), (3, 8.0)])
def test_equal_methods_with_4_and_12_points_are_rarely_told_apart(seeds: int, slope: float) -> None:
    """By all points as before: 5 to 12 in a hundred; by equally many points too: at most 5."""
    generator, runs = np.random.default_rng(11), 120
    plain, both, ahead = 0, 0, []
    level, levels = np.array([LEVEL]), np.full(DRAWS, LEVEL)
    for _ in range(runs):
        common = float(generator.normal()), generator.normal(size=DRAWS)
        few, many = (simulate(n, seeds, slope, common, generator) for n in (4, 12))
        told = []
        for size in (12, 4):
            value = [
                at_level_of_fewer(m[0], level, min(size, n), n, 1)["versatility"][0] for m, n in ((few, 4), (many, 12))
            ]
            drawn = [
                at_level_of_fewer(m[1], levels, min(size, n), n, 1)["versatility"] for m, n in ((few, 4), (many, 12))
            ]
            low, high = np.nanquantile(drawn[1] - drawn[0], [0.025, 0.975])
            told.append(not low <= 0 <= high)
            ahead.append((size, value[1] - value[0]))
        plain, both = plain + told[0], both + all(told)
    lucky, equal = (np.mean([gap for size, gap in ahead if size == n]) for n in (12, 4))
    assert lucky > 0.4 and abs(equal) < 0.35, "points: the luck of 12 against 4 is gone"
    assert both <= plain and both / runs <= 0.05
