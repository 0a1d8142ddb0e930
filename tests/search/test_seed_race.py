"""Rounds of seeds: who drops out, when they end, and in a simulation how often they name the best region."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from cofitune.search.seed_race import SeedRace, race_seeds, still_in

REGIONS, LEADERS, FURTHER = 12, 4, 12  # further: trainings, the same for all ways to spend them


class Training:
    """Regions with a true figure each, lower is better, around which every training is drawn anew."""

    def __init__(self, draw: Callable[[int, int], float], count: int, room: float = float("inf")) -> None:
        self.draw, self.room, self.spent = draw, room, 0
        self.values: dict[str, list[float | None]] = {str(n): [draw(n, 0)] for n in range(count)}

    def train(self, regions: Sequence[str], seed: int) -> str | None:
        for region in regions:
            if self.spent >= self.room:
                return "search.budget_trials: some"
            self.values[region].append(self.draw(int(region), seed))
            self.spent += 1
        return None

    def race(self, most: int, lower: bool = True) -> SeedRace:
        return race_seeds(list(self.values), range(1, most), self.train, lambda: self.values, lower_is_better=lower)


def test_what_is_worse_beyond_chance_gets_no_further_seed() -> None:
    noise = np.random.default_rng(1).normal(size=(3, 9)) * 0.01
    training = Training(lambda n, seed: float((0.1, 0.105, 0.9)[n] + noise[n, seed]), 3)
    race = training.race(4)
    assert race.left == ("0", "1") and race.reason == "search.repeat_most: 4"
    assert [len(own) for own in training.values.values()] == [4, 4, 2]


def test_the_rounds_end_when_one_is_left_and_high_may_be_good() -> None:
    noise = np.random.default_rng(1).normal(size=(3, 9)) * 0.01
    training = Training(lambda n, seed: float((0.1, 0.5, 0.9)[n] + noise[n, seed]), 3)
    race = training.race(9, lower=False)
    assert race == SeedRace(("2",), "one region is left") and training.spent == 3
    alone = Training(lambda n, seed: 1.0, 1)
    assert alone.race(9) == SeedRace(("0",), "one region is left") and alone.spent == 0


def test_a_limit_ends_them_with_what_there_is() -> None:
    noise = np.random.default_rng(1).normal(size=(4, 9))
    training = Training(lambda n, seed: float(noise[n, seed]), 4, room=6)
    race = training.race(9)
    assert race.reason == "search.budget_trials: some" and training.spent == 6 and len(race.left) > 1


def test_a_region_without_a_figure_under_some_seed_drops_out() -> None:
    values: dict[str, list[float | None]] = {"a": [0.1, 0.12], "b": [0.11, None], "c": [0.1, 0.11]}
    assert still_in(values, ("a", "b", "c"), 3, 4, lower_is_better=True) == ("a", "c")
    nothing: dict[str, list[float | None]] = {"a": [0.1, None], "b": [0.2, None]}
    assert still_in(nothing, ("a", "b"), 2, 4, lower_is_better=True) == ("a", "b")
    assert still_in({"a": [0.1], "b": [9.0]}, ("a", "b"), 2, 4, lower_is_better=True) == ("a", "b"), "no error is known"


def test_the_interval_is_that_of_all_looks_and_regions_together() -> None:
    """Four regions of two seeds: a pooled deviation of four degrees of freedom; three comparisons, five looks."""
    gap = 0.01
    reach = stats.t.ppf(1 - 0.025 / (5 * 3), 4) * gap / 2**0.5
    for distance, left in ((0.99 * reach, 4), (1.01 * reach, 3)):
        values = {n: [0.0, gap] for n in "abc"} | {"d": [distance, distance + gap]}
        assert len(still_in(values, tuple("abcd"), 4, 5, lower_is_better=True)) == left


def test_equal_regions_are_told_apart_in_at_most_one_race_of_twenty() -> None:
    generator, told = np.random.default_rng(11), 0
    for _ in range(400):
        noise = generator.normal(size=(LEADERS, 5))
        told += len(Training(lambda n, seed, noise=noise: float(noise[n, seed]), LEADERS).race(5).left) < LEADERS  # type: ignore[misc]
    assert told <= 0.05 * 400 + 2 * (0.05 * 0.95 * 400) ** 0.5


@pytest.mark.parametrize("spread", [0.5, 1.5, 4.0])  # of the true figures, in deviations of a training
def test_the_best_region_is_named_as_often_as_by_other_ways_of_spending(spread: float) -> None:
    """For as many trainings: a second seed for all, or three further ones for the leaders; and one seed alone."""
    generator, named, spent, runs = np.random.default_rng(7), dict.fromkeys(("one", "all", "fixed", "race"), 0), 0, 500
    for _ in range(runs):
        truth = spread * generator.normal(size=REGIONS)
        figures = truth[:, None] + generator.normal(size=(REGIONS, 1 + FURTHER))
        best = int(truth.argmin())
        leaders = figures[:, 0].argsort()[:LEADERS]
        named["one"] += leaders[0] == best
        named["all"] += figures[:, :2].mean(axis=1).argmin() == best
        named["fixed"] += leaders[figures[leaders, : 1 + FURTHER // LEADERS].mean(axis=1).argmin()] == best
        training = Training(lambda n, seed, f=figures[leaders]: float(f[n, seed]), LEADERS, FURTHER)  # type: ignore[misc]
        left = training.race(1 + FURTHER).left
        means = {region: np.mean([v for v in training.values[region] if v is not None]) for region in left}
        named["race"] += leaders[int(min(means, key=means.__getitem__))] == best
        spent += training.spent
    chance = 2 * (0.25 / runs) ** 0.5 * 0.5  # the ways see the same draws, so that they differ by less than this
    assert named["race"] / runs >= max(named[way] for way in ("one", "all", "fixed")) / runs - chance, named
    assert spent <= FURTHER * runs and (spread < 4 or spent < 0.95 * FURTHER * runs), spent / runs
