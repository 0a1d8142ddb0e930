"""Scores, against the same numbers worked out by hand or in another way."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import pytest

from cofitune.evaluation.scores import TaskScore, compare, normalise, put_together, summarise


def test_guessing_is_0_and_all_right_is_100() -> None:
    assert normalise(0.25, 0.25) == 0
    assert normalise(1, 0.25) == 100
    assert normalise(0.625, 0.25) == pytest.approx(50)
    assert normalise(0.1, 0.25) == pytest.approx(-20)
    assert normalise(0.3, 0) == pytest.approx(30)


def test_a_summary_equals_the_means_taken_one_by_one() -> None:
    rng = random.Random(0)
    names = ("speciality", "speciality", "gen_kn", "gen_kn", "gen_kn", "gen_rs", "instruct")
    tasks = {f"t{i}": TaskScore(c, rng.random(), rng.choice([0, 0.25, 0.5])) for i, c in enumerate(names)}
    value = {title: (t.raw - t.chance) / (1 - t.chance) * 100 for title, t in tasks.items()}
    speciality = (value["t0"] + value["t1"]) / 2
    knowledge = (value["t2"] + value["t3"] + value["t4"]) / 3
    versatility = (knowledge + value["t5"] + value["t6"]) / 3  # categories weigh alike, whatever their tasks
    summary = summarise(tasks, 0.3)
    assert summary.speciality == pytest.approx(speciality)
    assert summary.categories["gen_kn"] == pytest.approx(knowledge)
    assert summary.versatility == pytest.approx(versatility)
    assert summary.unified == pytest.approx(0.3 * speciality + 0.7 * versatility)
    assert summary.missing == ()


def test_a_missing_category_is_said_and_never_counts_as_0() -> None:
    tasks = {"a": TaskScore("speciality", 0.5, 0), "b": TaskScore("gen_kn", 0.8, 0), "c": TaskScore("gen_rs", 0.4, 0)}
    summary = summarise(tasks)
    assert summary.missing == ("instruct",)
    assert summary.categories["instruct"] is None
    assert summary.versatility == pytest.approx(60)
    alone = summarise({"a": tasks["a"]})
    assert (alone.speciality, alone.versatility, alone.unified) == (pytest.approx(50), None, None)
    assert alone.missing == ("gen_kn", "gen_rs", "instruct")


def test_changes_are_run_minus_base_and_retention_is_their_ratio() -> None:
    base = summarise({"s": TaskScore("speciality", 0.1, 0), "k": TaskScore("gen_kn", 0.7, 0.4)})
    run = summarise({"s": TaskScore("speciality", 0.6, 0), "k": TaskScore("gen_kn", 0.64, 0.4)})
    changes = compare(base, run)
    assert changes.spec_gain == pytest.approx(50)
    assert changes.categories["gen_kn"] == pytest.approx(-10)
    assert changes.categories["instruct"] is None
    assert changes.versatility == pytest.approx(-10)
    assert changes.unified == pytest.approx(20)
    assert changes.versatility_retained == pytest.approx(80)


def test_nothing_is_retained_of_a_base_that_has_nothing() -> None:
    base = summarise({"s": TaskScore("speciality", 0.1, 0), "k": TaskScore("gen_kn", 0.3, 0.4)})
    assert compare(base, base).versatility_retained is None


def test_put_together_keeps_the_raw_scores_beside_and_says_what_was_not_run() -> None:
    tasks = {"s": {"category": "speciality", "chance": 0}, "k": {"category": "gen_kn", "chance": 0.25}}

    def model(s: float, k: float) -> dict[str, Any]:
        return {"tasks": {"s": {"raw": s, "seconds": 1}, "k": {"raw": k, "seconds": 2}}, "more": "kept"}

    both = put_together(tasks, model(0.2, 0.5), model(0.4, 0.25), 0.5)
    assert both["base"]["tasks"]["k"] == {"raw": 0.5, "seconds": 2, "normalised": pytest.approx(100 / 3)}
    assert both["base"]["unified"] == pytest.approx(fmean([20, 100 / 3]))
    assert both["base"]["more"] == "kept"
    assert both["changes"]["spec_gain"] == pytest.approx(20)
    assert both["missing"] == ["gen_rs", "instruct"]
    alone = put_together(tasks, model(0.2, 0.5), None)
    assert alone["run"] is None and alone["changes"] is None
