"""Scores, against the same numbers worked out by hand or in another way."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cofitune.evaluation.statistics.scores import TaskScore, normalise, summarise


def test_guessing_is_0_and_all_right_is_100() -> None:
    assert normalise(0.25, 0.25) == 0
    assert normalise(1.0, 0.25) == 100
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


def test_arrays_of_scores_go_through_the_account_as_single_scores_do() -> None:
    raws = np.random.default_rng(0).random((5, 3))
    categories = ("speciality", "gen_kn", "instruct")
    together = summarise({c: TaskScore(c, raws[:, i], 0.25) for i, c in enumerate(categories)}, 0.4)
    for row in range(5):
        alone = summarise({c: TaskScore(c, float(raws[row, i]), 0.25) for i, c in enumerate(categories)}, 0.4)
        for name, value in alone.by_name().items():
            drawn = together.by_name()[name]
            assert (drawn is None) == (value is None) and (drawn is None or drawn[row] == pytest.approx(value))


def test_a_missing_category_is_said_and_never_counts_as_0() -> None:
    tasks = {"a": TaskScore("speciality", 0.5, 0), "b": TaskScore("gen_kn", 0.8, 0), "c": TaskScore("gen_rs", 0.4, 0)}
    summary = summarise(tasks)
    assert summary.missing == ("instruct",)
    assert summary.categories["instruct"] is None
    assert summary.versatility == pytest.approx(60)
    alone = summarise({"a": tasks["a"]})
    assert (alone.speciality, alone.versatility, alone.unified) == (pytest.approx(50), None, None)
    assert alone.missing == ("gen_kn", "gen_rs", "instruct")


def test_a_cross_entropy_stands_beside_and_enters_no_mean() -> None:
    nats = TaskScore("gen_kn", 2.5, 0, "nats")
    assert nats.score == 2.5
    summary = summarise({"n": nats, "k": TaskScore("gen_kn", 0.5, 0)})
    assert summary.categories["gen_kn"] == summary.versatility == pytest.approx(50)
    assert summarise({"n": nats}).missing == ("speciality", "gen_kn", "gen_rs", "instruct")
