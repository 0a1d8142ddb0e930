"""Paired statistics against slower and plainer ways, and in simulations whose truth is known."""

from __future__ import annotations

from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cofitune.evaluation.metrics import METRICS, Metric
from cofitune.evaluation.statistics.paired import (
    Bootstrap,
    TaskItems,
    compare_tasks,
    holm,
    mcnemar,
    noise_limit,
    seed_noise,
)
from cofitune.evaluation.statistics.scores import SUMMARIES, TaskScore, summarise

TIMES = 500  # simulated evaluations
GRADED = Metric("graded", binary=False)
LAYOUT = {  # title: category, chance, items, share right
    "law": ("speciality", 0.0, 80, 0.4),
    "mmlu": ("gen_kn", 0.25, 100, 0.55),
    "obqa": ("gen_kn", 0.25, 60, 0.5),
    "arc": ("gen_rs", 0.5, 80, 0.7),
    "ifeval": ("instruct", 0.0, 60, 0.5),
}


def joint(before: float, after: float, correlation: float) -> list[float]:
    """Probabilities of (both wrong, gained, lost, both right) for two correlated binary answers."""
    both = before * after + correlation * (before * (1 - before) * after * (1 - after)) ** 0.5
    return [1 - before - after + both, after - both, before - both, both]


def draw_tasks(
    rng: np.random.Generator, change: float, correlation: float, most: int | None = None
) -> dict[str, TaskItems]:
    """Two models' answers on every task; the second one's share right is `change` higher."""
    tasks = {}
    for title, (category, chance, items, share) in LAYOUT.items():
        cells = rng.choice(4, min(items, most or items), p=joint(share, share + change, correlation))
        scores = np.stack([cells >= 2, cells % 2 == 1]).astype(float)
        tasks[title] = TaskItems(category, METRICS["acc"], chance, scores)
    return tasks


def truth(name: str, change: float) -> float:
    """The true change of a summary score where every task's share right changes alike."""
    before, after = (
        summarise({t: TaskScore(c, share + d, chance) for t, (c, chance, _, share) in LAYOUT.items()}).by_name()[name]
        for d in (0, change)
    )
    assert before is not None and after is not None
    return after - before


def two_models(seed: int = 0, change: float = -0.1) -> dict[str, TaskItems]:
    return draw_tasks(np.random.default_rng(seed), change, 0.5)


def test_the_bootstrap_has_the_distribution_of_resampling_items_one_by_one() -> None:
    tasks = two_models()
    tasks["rouge"] = TaskItems("speciality", GRADED, 0.0, np.random.default_rng(1).random((2, 50)))
    rng = np.random.default_rng(2)
    slow: dict[str, list[float]] = {name: [] for name in SUMMARIES}
    for _ in range(3000):
        drawn: list[dict[str, TaskScore[float]]] = [{}, {}]
        for title, items in tasks.items():
            chosen = rng.integers(0, items.items + 2, items.items + 2)
            for m in (0, 1):
                own, coins = items.scores[m, np.minimum(chosen, items.items - 1)], chosen >= items.items
                own[coins] = [rng.integers(0, 2) for _ in range(coins.sum())]
                mean = float(items.scores[m].mean() + (np.sum(own) - items.scores[m].sum() - 1) / items.items)
                drawn[m][title] = TaskScore(items.category, mean, items.chance)
        before, after = (summarise(d, 0.3).by_name() for d in drawn)
        for name, value in after.items():
            slow[name].append(value - before[name])  # type: ignore[operator]
    fast = Bootstrap(tasks, 0.3)
    for name in SUMMARIES:
        result = fast.change(name, 1, 0)
        assert result is not None
        spread = float(np.std(slow[name]))
        low, high = np.quantile(slow[name], [0.025, 0.975])
        near = 0.3 if name in ("gen_rs", "instruct") else 0.1  # one task of 60 items has steps of 1/62
        assert result.low == pytest.approx(low, abs=near * spread)
        assert result.high == pytest.approx(high, abs=near * spread)


@pytest.mark.parametrize("difficulty", [0, 3], ids=["unrelated", "hard_for_both"])
def test_one_task_agrees_with_scipys_paired_bootstrap(difficulty: float) -> None:
    """Where items are hard for both models, an interval that is not paired is several times as wide."""
    rng = np.random.default_rng(0)
    scores = rng.normal(2, 1, (2, 400)) + difficulty * rng.normal(0, 1, 400)
    nats = Metric("loss", "nats", higher_is_better=False, binary=False)
    ours = Bootstrap({"t": TaskItems("speciality", nats, 0.0, scores)}, 0.5).task_change("t", 1, 0)
    theirs = stats.bootstrap(
        (scores[1], scores[0]), lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), paired=True,
        vectorized=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_without_a_changed_item_the_interval_still_has_width() -> None:
    scores = np.tile(np.arange(30) % 2, (2, 1)).astype(float)
    result = Bootstrap({"t": TaskItems("speciality", METRICS["acc"], 0.0, scores)}, 0.5).change("speciality", 1, 0)
    assert result is not None and result.value == 0 and result.low < 0 < result.high < 10


def test_a_call_repeats_its_interval_and_a_model_equals_itself() -> None:
    tasks = two_models()
    assert Bootstrap(tasks, 0.5).change("unified", 1, 0) == Bootstrap(tasks, 0.5).change("unified", 1, 0)
    none = Bootstrap(tasks, 0.5).change("versatility", 0, 0)
    assert none is not None and (none.value, none.low, none.high) == (0, 0, 0)


def test_mcnemar_is_the_binomial_sum() -> None:
    for lost, gained in ((0, 0), (3, 3), (9, 2), (1, 14), (0, 6)):
        n = lost + gained
        tail = sum(Fraction(comb(n, k), 2**n) for k in range(min(lost, gained) + 1))
        assert mcnemar(lost, gained) == pytest.approx(float(min(Fraction(1), 2 * tail)) if n else 1)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_lost_and_gained_are_the_items_that_changed_sides() -> None:
    scores = np.array([[1, 1, 0, 0, 1.0], [1, 0, 1, 0, 0]])
    graded = np.array([[0.5, 0.2, 0.9, 0.3], [0.5, 0.8, 0.1, 0.2]])
    tasks = {
        "t": TaskItems("speciality", METRICS["acc"], 0.0, scores),
        "g": TaskItems("gen_kn", GRADED, 0.0, graded),
        "n": TaskItems("gen_kn", Metric("loss", "nats", higher_is_better=False, binary=False), 0.0, graded),
    }
    result = compare_tasks(Bootstrap(tasks, 0.5), 1, 0)
    assert (result["t"].lost, result["t"].gained) == ((1, 4), (2,))
    assert result["t"].p == result["t"].p_holm == pytest.approx(1)
    assert (result["g"].lost, result["g"].gained, result["g"].p, result["g"].p_holm) == ((2,), (1,), None, None)
    assert (result["n"].lost, result["n"].gained, result["n"].p) == ((1,), (2, 3), None), "a tenth of their mean"
    assert result["n"].change.value == pytest.approx(result["g"].change.value / 100), "nats stay nats"


def test_a_ratio_whose_denominator_may_be_nothing_has_a_reason_instead() -> None:
    n = 200
    base, full, run = np.ones(n), np.r_[np.zeros(80), np.ones(120)], np.r_[np.zeros(20), np.ones(180)]
    tasks = {"k": TaskItems("gen_kn", METRICS["acc"], 0.0, np.stack([base, full, run]))}
    bootstrap = Bootstrap(tasks, 0.5)
    recovery = bootstrap.ratio("versatility", (2, 1), (0, 1), "what was forgotten")
    assert recovery.estimate is not None and recovery.estimate.value == pytest.approx(75)
    assert recovery.estimate.low < 75 < recovery.estimate.high
    undefined = bootstrap.ratio("versatility", (2, 1), (0, 0), "what was forgotten")
    assert undefined.estimate is None and "what was forgotten is 0.0 points" in (undefined.reason or "")
    kept = bootstrap.ratio("versatility", (1, None), (0, None), "the base's versatility")
    assert kept.estimate is not None and kept.estimate.value == pytest.approx(60)
    assert bootstrap.ratio("speciality", (2, 1), (0, 1), "x").reason == "there is no task to take it from"


def test_seed_noise_pools_the_variances_of_its_groups() -> None:
    groups: list[list[dict[str, float | None]]] = [[{"a": 1.0, "b": None}, {"a": 3.0, "b": 1.0}], [{"a": 5.0}] * 3]
    assert seed_noise(groups) == {"a": pytest.approx((2 / 3) ** 0.5)}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_noise_between_seeds_is_told_as_a_change_in_at_most_5_percent(seeds: int) -> None:
    """Two methods that differ in nothing, a run of one against the base or against a run of the other."""
    rng = np.random.default_rng(11)
    beyond, deviations = {"base": 0, "trained": 0, "one deviation": 0}, 4.0
    for _ in range(4000):
        first, second = rng.normal(0, deviations, (2, seeds))
        groups = [[{"a": float(value)} for value in values] for values in (first, second)]
        spread = seed_noise(groups)["a"]
        freedom = 2 * (seeds - 1)
        beyond["base"] += abs(first[0]) > noise_limit(spread, freedom, seeds, both_trained=False)
        apart = abs(first[0] - second[0])
        beyond["trained"] += apart > noise_limit(spread, freedom, seeds, both_trained=True)
        beyond["one deviation"] += apart > spread
    print(seeds, beyond)  # pytest -rP shows it
    most = stats.binom.ppf(0.999, 4000, 0.05)
    assert beyond["base"] <= most and beyond["trained"] <= most
    assert beyond["one deviation"] > 0.3 * 4000, "what was marked before"


def test_a_limit_is_a_students_t_times_the_spread_of_what_is_compared() -> None:
    assert noise_limit(2.0, 1, 2, both_trained=True) == pytest.approx(12.7062 * 2 * 2**0.5, rel=1e-4)
    assert noise_limit(2.0, 4, 5, both_trained=False) == pytest.approx(2.7764 * 2 * 1.2**0.5, rel=1e-4)


def simulate(change: float, correlation: float, most: int | None = None, draws: int = 1000) -> dict[str, Any]:
    """How often the intervals hold the truth and exclude 0, and how often Holm's smallest p is below 5 %.

    `most` items a task; 1,000 draws instead of 10,000 keep it quick and cost the ends of an interval little.
    """
    rng = np.random.default_rng(7)
    held, message = (dict.fromkeys(SUMMARIES, 0) for _ in range(2))
    rejected = 0
    true = {name: truth(name, change) for name in SUMMARIES}
    for _ in range(TIMES):
        bootstrap = Bootstrap(draw_tasks(rng, change, correlation, most), 0.5, draws, seed=int(rng.integers(2**31)))
        for name in SUMMARIES:
            result = bootstrap.change(name, 1, 0)
            assert result is not None
            held[name] += result.low - 1e-9 <= true[name] <= result.high + 1e-9
            message[name] += not result.holds_zero
        rejected += min(t.p_holm or 0 for t in compare_tasks(bootstrap, 1, 0).values()) < 0.05
    share = {name: held[name] / TIMES for name in SUMMARIES}
    return {"coverage": share, "told": {n: message[n] / TIMES for n in SUMMARIES}, "rejected": rejected / TIMES}


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_two_equal_models_are_told_apart_in_at_most_5_percent(correlation: float) -> None:
    result = simulate(0.0, correlation)
    print(result)  # pytest -rP shows it
    at_most = stats.binom.ppf(0.999, TIMES, 0.05) / TIMES  # chance alone goes beyond this in one of 1,000
    assert result["told"]["versatility"] <= at_most
    assert result["told"]["unified"] <= at_most
    assert result["rejected"] <= at_most


def test_a_damaged_model_is_found_and_the_intervals_cover() -> None:
    result = simulate(-0.08, 0.7)
    print(result)
    assert result["told"]["versatility"] >= 0.9
    for name in ("speciality", "versatility", "unified"):
        assert 0.93 <= result["coverage"][name] <= 0.97


def test_the_intervals_cover_with_twenty_items_a_task() -> None:
    result = simulate(-0.08, 0.7, most=20)
    print(result)
    for name in ("speciality", "versatility", "unified"):
        assert 0.93 <= result["coverage"][name] <= 0.98
