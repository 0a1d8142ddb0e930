"""Paired differences of trials, from the small files that outlive their samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cofitune.errors import ArtifactError
from cofitune.evaluation.metrics import Metric
from cofitune.evaluation.samples import Sample, TaskResult, save_result
from cofitune.evaluation.statistics.comparison import match_items
from cofitune.evaluation.statistics.paired import Bootstrap
from cofitune.search.item_scores import KeptAnswers, difference

METRIC = Metric("acc")


def result(title: str, category: str, scores: list[float]) -> TaskResult:
    samples = tuple(Sample(i, f"{title} {i}?", 0, None, (1.0, 2.0), 0, score) for i, score in enumerate(scores, 1))
    return TaskResult(title, category, METRIC, float(np.mean(scores)), 0.25, samples, 1.0)


def results(seed: int, right: float) -> dict[str, TaskResult]:
    draw = np.random.default_rng(seed)
    tasks = (("law", "speciality"), ("kn", "gen_kn"), ("rs", "gen_rs"))
    return {title: result(title, category, [float(x < right) for x in draw.random(40)]) for title, category in tasks}


def keep(folder: Path, name: str, results: dict[str, TaskResult], kept: KeptAnswers, steps: int = 60) -> None:
    for title, one in results.items():
        save_result(one, folder / name / f"{title}.jsonl")
    kept.keep(name, steps, folder / name)


@pytest.mark.parametrize("score", ["speciality", "versatility", "unified"])
def test_the_difference_is_that_of_the_evaluation(tmp_path: Path, score: str) -> None:
    a, b = results(1, 0.8), results(1, 0.5)
    kept = KeptAnswers(tmp_path / "items")
    keep(tmp_path, "a", a, kept)
    keep(tmp_path, "b", b, kept)
    tasks = match_items({"a": a, "b": b})
    # random draws go by the tasks' order, which is that of their titles here
    expected = Bootstrap({title: tasks[title] for title in sorted(tasks)}, 0.3).change(score, 0, 1)
    again = KeptAnswers(tmp_path / "items")  # another process, which finds files only
    for reader in (kept, again):
        assert difference(score, reader.get("a", 60), reader.get("b", 60), 0.3) == expected
    assert expected is not None and expected.value > 0


def test_answers_to_other_items_and_missing_ones_are_not_compared(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "items")
    keep(tmp_path, "a", results(1, 0.8), kept)
    other = results(1, 0.8)
    other["law"] = result("law of another land", "speciality", [1.0] * 40)
    keep(tmp_path, "b", {"law": other["law"], "kn": other["kn"], "rs": other["rs"]}, kept)
    assert difference("unified", kept.get("a", 60), kept.get("b", 60), 0.5) is None
    assert kept.get("a", 15) is None and difference("unified", kept.get("a", 60), None, 0.5) is None


def test_each_step_has_answers_of_its_own(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "items")
    keep(tmp_path, "a", results(1, 0.2), kept, steps=15)
    keep(tmp_path, "a", results(1, 0.9), kept, steps=60)
    early, late = (KeptAnswers(tmp_path / "items").get("a", steps) for steps in (15, 60))
    change = difference("unified", late, early, 0.5)
    assert change is not None and change.low > 0


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "items")
    keep(tmp_path, "a", results(1, 0.8), kept)
    (path,) = (tmp_path / "items").iterdir()
    for text in ("[", "[]", '{"law": {}}'):
        path.write_text(text)
        with pytest.raises(ArtifactError, match="damaged"):
            KeptAnswers(tmp_path / "items").get("a", 60)
