"""Several seeds of the same regions, against scipy's one-way analysis and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cofitune.search.repeat import judge_seeds


def test_the_pooled_deviation_and_the_correlation_are_scipys() -> None:
    generator = np.random.default_rng(5)
    figures = generator.normal(size=(5, 1)) * 0.3 + generator.normal(size=(5, 3)) * 0.1
    judged = judge_seeds({f"r{i}": list(map(float, own)) for i, own in enumerate(figures)}, (1, 2, 3))
    residuals = figures - figures.mean(axis=1, keepdims=True)
    assert judged.deviation == pytest.approx(np.sqrt((residuals**2).sum() / (5 * 2))) and judged.freedom == 10
    assert judged.standard_error == pytest.approx(np.sqrt((residuals**2).sum() / 10 / 3))
    pairs = [stats.spearmanr(figures[:, a], figures[:, b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    assert judged.correlation == pytest.approx(np.mean(pairs))


def test_a_region_ties_where_the_t_interval_of_the_difference_contains_0() -> None:
    values = {"won": [0.10, 0.12], "near": [0.12, 0.14], "far": [0.50, 0.52], "once": [0.16]}
    judged = judge_seeds(values, (1, 2))
    deviation = (3 * 0.0002 / 3) ** 0.5  # three regions, a variance of 0.0002 each
    assert judged.deviation == pytest.approx(deviation)
    reach = stats.t.ppf(0.975, 3) * deviation
    assert 0.02 < reach < 0.05 < reach * 1.5**0.5
    assert judged.ties("won") == ("near", "once") and judged.regions == ("won", "near", "far")


def test_false_ties_and_differences_keep_to_their_rate() -> None:
    """Of equal regions, one in twenty is told from another."""
    generator = np.random.default_rng(7)
    told = 0
    for _ in range(1000):
        values = {name: list(map(float, generator.normal(size=2))) for name in ("a", "b", "c", "d")}
        told += "b" not in judge_seeds(values, (1, 2)).ties("a")
    assert 30 <= told <= 75


def test_figures_that_are_missing_are_left_out() -> None:
    judged = judge_seeds({"a": [1.0, None], "b": [2.0, 2.2], "c": [None, None]}, (1, 2))
    assert judged.means == {"a": 1.0, "b": pytest.approx(2.1)} and judged.counts == {"a": 1, "b": 2}
    assert judged.correlation is None and judged.freedom == 1
    nothing = judge_seeds({"a": [1.0, None]}, (1, 2))
    assert nothing.deviation is None and nothing.standard_error is None and nothing.ties("a") == ()
