"""What a report reads of a file is checked: a damaged one is named with the place of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofitune.errors import ArtifactError
from cofitune.reports.compare.content import Comparison
from cofitune.reports.evaluation.scores import Scores

MODEL = {"categories": {"speciality": 40.0}, "versatility": 50.0, "unified": None, "seed": 7}
CHANGE = {"value": 1.0, "low": -1.0, "high": 2, "within_noise": None}
SCORES: dict[str, Any] = {
    "format": 2,
    "models": {"base": MODEL, "run": MODEL},
    "comparisons": [{"model": "run", "against": "base", "summary": {"unified": CHANGE, "instruct": None}}],
}


def _write(folder: Path, content: Any) -> Path:
    path = folder / "eval" / "scores.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path


def test_scores_are_read_and_what_no_report_needs_is_left_aside(tmp_path: Path) -> None:
    scores = Scores.read(_write(tmp_path, SCORES))
    assert (scores.base, scores.others) == ("base", ["run"]) and scores.models["run"].score("speciality") == 40.0
    change = scores.change("run", "unified", None)
    assert change is not None and (change.high, change.sign) == (2.0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SCORES | {"format": 1}, "its format is 1, and 2 is what we read.*cofitune eval"),
        (SCORES | {"models": {"base": {"versatility": 1.0, "unified": 2.0}}}, "models.base.categories is missing"),
        (SCORES | {"models": {"base": MODEL | {"unified": "high"}}}, "models.base.unified: "),
        ({"format": 2, "models": {}}, "comparisons is missing"),
        ([], "scores.json: this evaluation is damaged"),
    ],
)
def test_a_damaged_evaluation_is_told_with_the_place(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Scores.read(_write(tmp_path, content))


def test_a_damaged_comparison_is_told_with_the_place(tmp_path: Path) -> None:
    path = _write(tmp_path, {"format": 1, "matched": [{"speciality": 1.0, "rows": {"full": {}}}]})
    with pytest.raises(ArtifactError, match="this comparison is damaged: matched: KeyError..reason"):
        Comparison.read(path)
    path.write_text(json.dumps({"format": 1, "matched": [], "reference": 3}))
    with pytest.raises(ArtifactError, match="this comparison is damaged: reference: "):
        Comparison.read(path)
