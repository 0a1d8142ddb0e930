"""The model card: what was trained, the scores of these very weights, the base's licence, and no path of a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune.recipes.model_card import model_card
from cofitune.reports.evaluation.scores import FORMAT

MANIFEST: dict[str, Any] = {
    "base": "/machine/secret/llama", "delta_sha256": "d1", "steps": 30, "last_loss": 1.25, "seed": 7, "adapter": None,
    "region": {"layers": "8-15", "modules": ["up_proj", "down_proj"], "trained_weights": 5000, "all_weights": 90000},
    "softmask": {"apply_to": "update", "modules": ["down_proj"]}, "items": [{"kept": 1200}],
    "data": [{"path": "/machine/secret/law.jsonl", "sha256": "s"}], "rehearsal": {"items": 40},
    "drift": {"curve": [{"step": 30, "drift": 0.125}]},
}  # fmt: skip


def card(tmp_path: Path, alpha: float = 1.0, **changed: Any) -> tuple[dict[str, Any], str]:
    """The front matter and the text."""
    text = model_card({**MANIFEST, **changed}, tmp_path / "base", tmp_path / "run", alpha, "bfloat16", "law")
    _, head, body = text.split("---\n", 2)
    return dict(yaml.safe_load(head)), body


def write_scores(run: Path) -> None:
    def model(value: float, **about: Any) -> dict[str, Any]:
        summary = {"categories": {"speciality": value, "gen_kn": None, "gen_rs": None, "instruct": None}}
        return {**summary, "versatility": None, "unified": value, "tasks": {}, **about}

    def compared(name: str, value: float) -> dict[str, Any]:
        change = {"value": value, "low": value - 1, "high": value + 1}
        summary = {"speciality": change, "gen_kn": None, "unified": change}
        return {"model": name, "against": "base", "summary": summary}

    content = {
        "format": FORMAT,
        "models": {
            "base": model(10.0), "run": model(30.0, delta_sha256="d1"),
            "half": model(25.0, delta_sha256="d1", alpha=0.5),
        },
        "comparisons": [compared("run", 20.0), compared("half", 15.0)],
        "tasks": {"law_test": {"category": "speciality", "metric": "acc", "items": 9, "unit": "share"}},
    }  # fmt: skip
    (run / "eval").mkdir(parents=True)
    (run / "eval/scores.json").write_text(json.dumps(content))


def test_it_says_what_was_trained_without_a_path_of_the_machine(tmp_path: Path) -> None:
    head, body = card(tmp_path)
    assert head["base_model"] == "llama" and head["license"] == "unknown" and head["tags"] == ["cofitune"]
    for text in (
        "layers 8-15, modules up_proj, down_proj", "5,000 of 90,000", "law.jsonl (1,200 items)", "update on down_proj",
        "40 of the base's own answers", "0.1250 nats", "have not been scored", "write it into the field `license`",
    ):  # fmt: skip
        assert text in body
    assert "secret" not in body and "Alpha" not in body
    adapter = {"kind": "lora", "modules": ["q_proj"], "r": 8, "alpha": 16}
    assert "Adapter, merged: lora (r 8, alpha 16) on q_proj of all layers" in card(tmp_path, adapter=adapter)[1]
    assert card(tmp_path, base="org/llama")[0]["base_model"] == "org/llama"


@pytest.mark.parametrize(("alpha", "row"), [(1.0, "30.0 | +20.0 | +19.0 to +21.0"), (0.5, "25.0 | +15.0")])
def test_its_scores_are_those_of_these_weights(tmp_path: Path, alpha: float, row: str) -> None:
    write_scores(tmp_path / "run")
    assert f"| speciality (law_test) | 10.0 | {row}" in card(tmp_path, alpha)[1]
    assert "have not been scored" in card(tmp_path, 0.7)[1], "no model of the evaluation is at 0.7"
    assert "have not been scored" in card(tmp_path, alpha, delta_sha256="trained anew")[1]


def test_the_licence_is_the_one_that_the_bases_card_names(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    head, body = card(tmp_path)
    assert head["license"] == "apache-2.0" and "names `apache-2.0`" in body
    (tmp_path / "base/README.md").write_text("---\n: [broken\n---\n")
    assert card(tmp_path)[0]["license"] == "unknown"


def test_a_converted_base_is_named_as_what_it_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"cofitune_converted": {"base": "org/llama-fp8"}}))
    head, body = card(tmp_path)
    assert head["base_model"] == "org/llama-fp8" and "`org/llama-fp8`, fine-tuned" in body
