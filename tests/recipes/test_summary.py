"""summary.json: a run in one file, from its artifacts alone, also where these are an older version's or another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofitune.errors import ArtifactError
from cofitune.recipes.summary import summarise_run, write_summary

MANIFEST: dict[str, Any] = {
    "base": "/m", "base_fingerprint": "f", "delta_sha256": "d1", "steps": 3, "first_loss": 2.0, "last_loss": 1.5,
    "seconds": 9.5, "tokens": 70, "ranks": 2, "seed": 7, "dtype": "float32", "adapter": None,
    "region": {"layers": "8-15", "modules": ["up_proj"], "trained_weights": 5, "all_weights": 9},
    "items": [{"kept": 4}, {"kept": 5}], "data": [{"path": "a", "sha256": "s"}],
    "validation": {"losses": [{"step": 0, "validation_loss": 3.0}, {"step": 3, "validation_loss": 2.5}]},
    "drift": {"curve": [{"step": 0, "drift": 0.0}, {"step": 3, "drift": 0.25}], "exceeded": None},
}  # fmt: skip


def score(value: float, path: Path, sha256: str | None) -> dict[str, Any]:
    tasks = {"law": {"raw": value, "score": value, "seconds": 2.0}}
    return {
        "path": str(path), "delta_sha256": sha256, "tasks": tasks, "categories": {"speciality": value},
        "versatility": None, "unified": value,
    }  # fmt: skip


def write(run: Path, manifest: dict[str, Any], delta_of_scores: str = "d1") -> Path:
    change = {"value": 20.0, "low": 10.0, "high": 30.0}
    scores = {
        "models": {"base": score(10.0, Path("/m"), None), "run": score(30.0, run, delta_of_scores)},
        "comparisons": [
            {
                "model": "run",
                "against": "base",
                "summary": {"speciality": change, "versatility": None, "unified": change},
            }
        ],
        "gate": [],
    }
    for name, content in {"train/manifest.json": manifest, "eval/scores.json": scores}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))
    return run


def test_it_says_what_was_trained_how_it_scores_and_what_lies_where(tmp_path: Path) -> None:
    run = write(tmp_path / "run", MANIFEST)
    content = json.loads(write_summary(run).read_text())
    training, evaluation = content["training"], content["evaluation"]
    assert (training["region"], training["items"]) == ({"layers": "8-15", "modules": ["up_proj"]}, 9)
    assert (training["validation_loss"], training["drift"], training["seconds"]) == (2.5, 0.25, 9.5)
    assert evaluation["models"]["run"] == {"speciality": 30.0, "versatility": None, "unified": 30.0}
    assert evaluation["changes"] == {"run": {"speciality": 20.0, "unified": 20.0}}
    assert evaluation["of_this_training"] is True and evaluation["seconds"] == 4.0
    assert content["paths"] == {"manifest": "train/manifest.json", "scores": "eval/scores.json"}


def test_scores_of_an_earlier_training_are_told_apart(tmp_path: Path) -> None:
    run = write(tmp_path / "run", MANIFEST, delta_of_scores="of before")
    evaluation = summarise_run(run)["evaluation"]
    assert isinstance(evaluation, dict) and evaluation["of_this_training"] is False


def test_an_older_manifest_says_less_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    training = summarise_run(write(tmp_path / "old", {"base": "/m", "delta_sha256": "d1"}))["training"]
    assert isinstance(training, dict)
    assert training["base"] == "/m" and training["drift"] is None and training["items"] == 0
    with pytest.raises(ArtifactError, match="is damaged"):
        summarise_run(write(tmp_path / "bad", {"items": [3]}))
    assert summarise_run(tmp_path / "nothing") == {"format": 1, "training": None, "evaluation": None, "paths": {}}
