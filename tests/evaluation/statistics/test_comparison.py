"""The computed part of scores.json: who is compared with whom, what is marked, what was lost."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cofitune.errors import UserError
from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.evaluation.statistics.comparison import Compared, build_scores, changed_items

TASKS = {"law": ("speciality", "exact_match", 0.0), "arc": ("gen_rs", "acc", 0.25)}


def answers(law: list[int], arc: list[int]) -> dict[str, TaskResult]:
    """A model's results, right or wrong as the lists say."""
    results = {}
    for title, scores in (("law", law), ("arc", arc)):
        category, metric, chance = TASKS[title]
        samples = [Sample(i + 1, f"{title} {i}?", i, f"answer {s}", None, None, s) for i, s in enumerate(scores)]
        raw = sum(scores) / len(scores)
        results[title] = TaskResult(title, category, METRICS[metric], raw, chance, tuple(samples), 0.1)
    return results


def shares(*right: tuple[int, int], n: int = 40) -> dict[str, dict[str, TaskResult]]:
    """Models named base, m1, m2 … with so many right answers of `n`."""
    return {
        f"m{i}" if i else "base": answers([1] * law + [0] * (n - law), [1] * arc + [0] * (n - arc))
        for i, (law, arc) in enumerate(right)
    }


def test_scores_and_changes_are_those_of_the_account() -> None:
    result = build_scores(shares((4, 28), (24, 22)), Compared("base"), 0.5)
    base, run = result["models"]["base"], result["models"]["m1"]
    assert base["tasks"]["arc"]["raw"] == pytest.approx(0.7) and base["tasks"]["arc"]["score"] == pytest.approx(60)
    assert (base["categories"]["gen_rs"], base["versatility"]) == (pytest.approx(60), pytest.approx(60))
    assert base["unified"] == pytest.approx(35) and run["unified"] == pytest.approx(50)
    assert result["missing"] == ["gen_kn", "instruct"]
    (comparison,) = result["comparisons"]
    assert (comparison["model"], comparison["against"]) == ("m1", "base")
    summary = comparison["summary"]
    assert summary["speciality"]["value"] == pytest.approx(50) and summary["versatility"]["value"] == pytest.approx(-20)
    assert summary["gen_kn"] is None
    assert summary["versatility"]["low"] < -20 < summary["versatility"]["high"] < 0
    law = comparison["tasks"]["law"]
    assert (law["lost"], law["gained"]) == ([], list(range(4, 24)))
    assert law["p"] == pytest.approx(2 * 0.5**20) and law["p_holm"] == pytest.approx(4 * 0.5**20)
    assert comparison["ratios"]["versatility_retained"]["value"] == pytest.approx(100 * 40 / 60)
    json.dumps(result, allow_nan=False)


def test_full_fine_tuning_is_a_second_yardstick() -> None:
    result = build_scores(shares((4, 36), (34, 20), (24, 32)), Compared("base", full_sft="m1"))
    pairs = [(c["model"], c["against"]) for c in result["comparisons"]]
    assert pairs == [("m1", "base"), ("m2", "base"), ("m2", "m1")]
    ratios = result["comparisons"][2]["ratios"]
    assert ratios["vers_recovery"]["value"] == pytest.approx(100 * 12 / 16)
    assert ratios["spec_gain_kept"]["value"] == pytest.approx(100 * 20 / 30)
    assert ratios["vers_recovery"]["low"] < 75 < ratios["vers_recovery"]["high"]


def test_an_undefined_ratio_is_null_with_its_reason() -> None:
    result = build_scores(shares((4, 36), (34, 35), (24, 32)), Compared("base", full_sft="m1"))
    recovery = result["comparisons"][2]["ratios"]["vers_recovery"]
    assert recovery["value"] is None and recovery["low"] is None
    assert "what 'm1' forgot of versatility is 3.3 points" in recovery["reason"]


def test_the_noise_is_the_spread_over_seeds_and_marks_what_a_seed_makes() -> None:
    models = shares((4, 30), (24, 29), (28, 21))
    result = build_scores(models, Compared("base", seed_groups=(("m1", "m2"),)))
    noise = result["noise_floor"]
    assert noise["runs"] == [["m1", "m2"]]
    assert noise["scores"]["summary"]["speciality"] == pytest.approx(float(np.std([60, 70], ddof=1)))
    assert noise["scores"]["tasks"]["arc"] == pytest.approx(float(np.std([29, 21], ddof=1)) / 40 * 100 / 0.75)
    first = result["comparisons"][0]["summary"]
    assert noise["freedom"] == 1
    # two seeds 10 points apart say nothing of a change by 50: a t-quantile with one degree of freedom is 12.7
    assert noise["limits"]["base"]["summary"]["speciality"] == pytest.approx(12.7062 * 50**0.5 * 1.5**0.5, rel=1e-4)
    assert first["versatility"]["within_noise"] is True and first["speciality"]["within_noise"] is True
    close = build_scores(shares((4, 30), (24, 29), (24, 29)), Compared("base", seed_groups=(("m1", "m2"),)))
    first = close["comparisons"][0]["summary"]
    assert first["speciality"]["within_noise"] is False, "two seeds that agree"
    alone = build_scores(models, Compared("base"))
    assert alone["noise_floor"]["scores"] is None and "different training seeds" in alone["noise_floor"]["reason"]
    assert alone["comparisons"][0]["summary"]["versatility"]["within_noise"] is None


def test_other_items_cannot_stand_side_by_side() -> None:
    models = shares((4, 30), (24, 29))
    other = models["m1"]["arc"]
    for samples in (other.samples[:-1], (replace(other.samples[0], prompt="another?"), *other.samples[1:])):
        changed = models | {"m1": models["m1"] | {"arc": replace(other, samples=samples)}}
        with pytest.raises(UserError, match="'base' and 'm1' were not asked the same items of task 'arc'"):
            build_scores(changed, Compared("base"))


def test_lost_and_gained_items_come_with_their_text_and_both_answers() -> None:
    models = shares((4, 30), (6, 29))
    result = build_scores(models, Compared("base"))
    choices: dict[str, list[tuple[str, ...]]] = {"law": [()] * 40, "arc": [("yes", "no")] * 40}
    changed = changed_items(models, result["comparisons"][0], choices)
    assert [entry["line"] for entry in changed["gained"]] == [5, 6]
    assert changed["lost"] == [
        {
            "task": "arc", "line": 30, "prompt": "arc 29?", "reference": 29, "choices": ["yes", "no"],
            "before": {"answer": "answer 1", "score": 1}, "after": {"answer": "answer 0", "score": 0},
        }
    ]  # fmt: skip
