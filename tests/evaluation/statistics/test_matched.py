"""Versatility at matched speciality, on models whose items are made up and whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cofitune.evaluation.metrics import Metric
from cofitune.evaluation.statistics.matched import Point, match_methods
from cofitune.evaluation.statistics.paired import Bootstrap, TaskItems
from cofitune.reports.compare.content import Comparison, Row

SHARE = Metric("acc", "share", True, True)
ITEMS = 200


def bootstrap(models: list[tuple[float, float, float]]) -> Bootstrap:
    """Models by their shares of right answers in speciality, knowledge and instructions, always the first items."""

    def task(category: str, number: int) -> TaskItems:
        scores = np.array([[float(i < round(m[number] * ITEMS)) for i in range(ITEMS)] for m in models])
        return TaskItems(category, SHARE, 0.0, scores)

    return Bootstrap({"law": task("speciality", 0), "know": task("gen_kn", 1), "follow": task("instruct", 2)}, 0.5)


def matched(models: list[tuple[float, float, float]], methods: dict[str, list[Point]]) -> dict[str, Any]:
    return match_methods(bootstrap(models), methods, "full")


def test_a_method_that_forgets_less_is_told_apart_at_the_same_speciality() -> None:
    models = [(0.0, 0.6, 0.6), (0.4, 0.3, 0.3), (0.8, 0.1, 0.1), (0.2, 0.6, 0.6), (0.6, 0.5, 0.3)]
    points = {
        "full": [Point("f1", 1e-4, 1, (1,)), Point("f2", 2e-4, 1, (2,))],
        "mask": [Point("m1", 1e-4, 1, (3,)), Point("m2", 2e-4, 1, (4,))],
        "late": [],
    }
    result = matched(models, points)
    assert result["frontiers"] == {
        "full": ["base", "f1", "f2"], "mask": ["m1", "m2"], "late": ["base"],
    }, "m1 forgets nothing"  # fmt: skip
    assert [(level["point"], level["speciality"]) for level in result["matched"]] == [
        ("f1", pytest.approx(40)), ("m2", pytest.approx(60)), ("f2", pytest.approx(80)),
    ]  # fmt: skip
    assert result["matched"][1]["why"].startswith("the highest"), (
        "a method without a run takes no level from the others"
    )
    first, common, last = (level["rows"] for level in result["matched"])
    # half way between m1 and m2: knowledge 55, instructions 45, versatility 50 against full's 30
    assert first["mask"]["between"] == ["m1", "m2"] and first["mask"]["weight"] == pytest.approx(0.5)
    assert first["mask"]["versatility"] == pytest.approx(50) and first["full"]["versatility"] == pytest.approx(30)
    difference = first["mask"]["versatility_against_reference"]
    assert difference["value"] == pytest.approx(20) and 10 < difference["low"] < 20 < difference["high"] < 30
    assert first["mask"]["instruct_against_reference"]["value"] == pytest.approx(15)
    assert first["mask"]["versatility_against_base"]["value"] == pytest.approx(-10)
    assert common["full"]["versatility"] == pytest.approx(20), "half way between f1 and f2"
    assert first["full"]["versatility_against_reference"] is None
    assert last["mask"]["versatility"] is None and last["mask"]["reason"] == "mask reaches a speciality of 60.0 at most"


def test_equal_methods_differ_by_nothing() -> None:
    models = [(0.0, 0.6, 0.6), *[(0.4, 0.3, 0.3), (0.8, 0.1, 0.1)] * 2]
    points = {
        "full": [Point("f1", 1, 1, (1,)), Point("f2", 2, 1, (2,))],
        "twin": [Point("t1", 1, 1, (3,)), Point("t2", 2, 1, (4,))],
    }
    within, highest = (
        level["rows"]["twin"]["versatility_against_reference"] for level in matched(models, points)["matched"]
    )
    assert within["value"] == 0 and within["low"] < 0 < within["high"]
    assert within["draws_inside"] >= 0.95 and within["reason"] is None
    assert highest["value"] == 0 and highest["low"] is None and 0 < highest["draws_inside"] < 0.95
    assert "of the draws only" in highest["reason"], "in the others the twin does not reach what full learnt most"


def test_several_levels_at_once_have_a_wider_interval_each() -> None:
    models = [(0.0, 0.6, 0.6), *[(0.3, 0.5, 0.5), (0.6, 0.3, 0.3), (0.9, 0.1, 0.1)] * 2]
    points = {
        name: [Point(f"{name}{n}", n, 1, (first + n,)) for n in range(3)] for name, first in (("full", 1), ("twin", 4))
    }
    levels = [level["rows"]["twin"]["versatility_against_reference"] for level in matched(models, points)["matched"]]
    assert len(levels) == 3
    for row in levels[:2]:
        assert row["low_corrected"] < row["low"] < 0 < row["high"] < row["high_corrected"]
        # of a normal distribution: z(1 − 0.05 / 6) / z(1 − 0.05 / 2)
        assert row["high_corrected"] / row["high"] == pytest.approx(2.394 / 1.960, rel=0.1)
    alone = matched(models[:2] + models[4:5], {"full": [Point("f", 1, 1, (1,))], "twin": [Point("t", 1, 1, (2,))]})
    assert "low_corrected" not in alone["matched"][0]["rows"]["twin"]["versatility_against_reference"]


def test_unequal_numbers_of_points_are_compared_with_equally_many_too() -> None:
    models = [(0.0, 0.6, 0.6), (0.4, 0.3, 0.3), (0.8, 0.1, 0.1), (0.2, 0.6, 0.6), (0.5, 0.5, 0.5), (0.8, 0.4, 0.4)]
    points = {
        "full": [Point("f1", 1, 1, (1,)), Point("f2", 2, 1, (2,))],
        "mask": [Point("m1", 1, 1, (3,)), Point("m2", 2, 1, (4,)), Point("m3", 3, 1, (5,))],
    }
    result = matched(models, points)
    row = result["matched"][0]["rows"]["mask"]["versatility_against_reference"]
    fewer = row["with_equal_points"]
    # at 40 m1 and m2 lie at 60 - 10 * 2/3; with two of the three points m1, m3 at 53.3 and m2, m3 at 52 (from the base)
    assert row["value"] == pytest.approx(53.333 - 30, abs=0.01)
    assert fewer["points"] == 2 and fewer["value"] == pytest.approx((53.333 + 52) / 2 - 30, abs=0.7)
    assert fewer["low"] > 0
    (told,) = [row.differences["versatility"] for row in [_comparison_row(result)]]
    assert told is not None and told.is_shown
    assert not replace(told, with_equal_points=replace(told, low=-1.0, low_corrected=-2.0)).is_shown
    behind = replace(
        told, value=-5.0, low=-9.0, high=-1.0, low_corrected=-9.0, high_corrected=-1.0, with_equal_points=None
    )
    assert behind.is_shown and not replace(told, with_equal_points=behind).is_shown
    equal = matched(models[:5], points | {"mask": points["mask"][:2]})
    assert "with_equal_points" not in equal["matched"][0]["rows"]["mask"]["versatility_against_reference"]


def _comparison_row(result: dict[str, Any]) -> Row:
    content = {"reference": "full", "partial": None, "seeds": [1], "methods": {}, "runs": [], **result}
    return Comparison.of(content).matched[0].rows["mask"]


def test_a_mask_is_held_against_its_controls() -> None:
    models = [(0.0, 0.6, 0.6), (0.4, 0.3, 0.3), (0.4, 0.2, 0.2), (0.8, 0.1, 0.1), (0.4, 0.5, 0.5), (0.8, 0.1, 0.1)]
    points = {
        "full": [Point("f", 1, 1, (1,))],
        "uniform": [Point("u1", 1, 1, (2,)), Point("u2", 2, 1, (3,))],
        "mask": [Point("m1", 1, 1, (4,)), Point("m2", 2, 1, (5,))],
        "shuffled": [],
    }
    result = match_methods(bootstrap(models), points, "full", ["mask"], ["uniform", "shuffled"])
    uniform, shuffled = result["against_controls"]
    assert (uniform["control"], shuffled) == ("uniform", {"control": "shuffled", "matched": []})
    first = uniform["matched"][0]
    assert first["point"] == "u1" and list(first["rows"]) == ["uniform", "mask"]
    difference = first["rows"]["mask"]["versatility_against_reference"]
    assert difference["value"] == pytest.approx(30) and 20 < difference["low"] < 30 < difference["high"] < 40
    assert matched(models, points)["against_controls"] == []


def test_without_overlap_or_learning_there_is_null_and_a_reason() -> None:
    models = [(0.3, 0.6, 0.6), (0.5, 0.3, 0.3), (0.2, 0.5, 0.5)]
    result = matched(models, {"full": [Point("f", 1, 1, (1,))], "worse": [Point("w", 1, 1, (2,))], "none": []})
    assert [level["point"] for level in result["matched"]] == ["f"], "below the base nothing is matched"
    rows = result["matched"][0]["rows"]
    assert rows["worse"]["reason"] == "worse reaches a speciality of 30.0 at most"
    assert rows["none"]["reason"] == "none has no finished run"
    assert rows["worse"]["versatility_against_reference"] is None
    assert result["points"][1]["dominated_by"] == "base" and not result["points"][1]["on_frontier"]
    assert matched(models, {"full": [], "worse": [Point("w", 1, 1, (2,))]})["matched"] == []


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    calm = [(0.0, 0.6, 0.6), (0.4, 0.3, 0.3), (0.4, 0.3, 0.3), (0.4, 0.5, 0.5), (0.4, 0.5, 0.5), (0.8, 0.1, 0.1)]
    wild = [(0.0, 0.6, 0.6), (0.4, 0.3, 0.3), (0.4, 0.3, 0.3), (0.4, 0.3, 0.3), (0.4, 0.7, 0.7), (0.8, 0.1, 0.1)]
    # what the mask learnt most is more than the level, so that the level is reached in every draw
    masked = [Point("m", 1, 1, (3, 4)), Point("m2", 2, 1, (5, 5))]
    points = {"full": [Point("f", 1, 1, (1, 2))], "mask": masked}
    differences = []
    for models in (calm, wild):
        row = matched(models, points)["matched"][0]["rows"]["mask"]
        assert row["versatility"] == pytest.approx(50)
        differences.append(row["versatility_against_reference"])
    widths = [d["high"] - d["low"] for d in differences]
    assert differences[0]["value"] == pytest.approx(differences[1]["value"]) == pytest.approx(20)
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("turned", [False, True])
def test_the_choices_of_the_draws_are_those_of_the_value(turned: bool) -> None:
    """Two points of the same speciality, on other items: the draws' mean is a little higher of one, by chance."""
    right = np.zeros((4, ITEMS))
    right[1, :80], right[2, :160], right[3, -160:] = 1, 1, 1
    known = np.array([[float(i < n) for i in range(ITEMS)] for n in (120, 100, 120, 20)])
    items = {"law": TaskItems("speciality", SHARE, 0.0, right), "know": TaskItems("gen_kn", SHARE, 0.0, known)}
    two = [Point("m1", 1, 1, (2,)), Point("m2", 2, 1, (3,))]
    methods = {"full": [Point("f", 1, 1, (1,))], "mask": two[::-1] if turned else two}
    row = match_methods(Bootstrap(items, 0.5), methods, "full")["matched"][0]["rows"]["mask"]
    fewer = row["versatility_against_reference"]["with_equal_points"]
    assert fewer["low"] <= fewer["value"] <= fewer["high"]
