"""`cofitune config validate`: all that is wrong at once, what is missing apart from it, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_command, write_config, write_jsonl

ITEM = {"instruction": "Say hi.", "output": "Hi!"}


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    data = str(write_jsonl(tmp_path / "d.jsonl", [ITEM, "{broken"]))
    test = str(write_jsonl(tmp_path / "t.jsonl", [ITEM]))
    return {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": [data], "max_length": 64},
        "rehearsal": {"data": [test]},
        "train": {"rehearsal": {"share": 0.2}},
        "eval": {
            "speciality": [{"path": test, "kind": "generate", "answer_field": "output"}],
            "drift": [str(tmp_path / "run" / "rehearsal")],
        },
        "output_dir": str(tmp_path / "run"),
    }


def test_a_good_config_is_valid_and_nothing_is_written(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "config", "validate", write_config(config)) == 0
    said = capsys.readouterr().out
    assert "4 layers; region 1 × up+down" in said and "t (1)" in said and "valid" in said
    for key in ("train.rehearsal", "eval.drift"):
        line = f"{key}: `cofitune rehearse` makes {tmp_path / 'run' / 'rehearsal'}"
        assert line in said, "what another command makes is missing, and not wrong"
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_told_at_once(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["train"] = [str(tmp_path / "none.jsonl")]
    config["rehearsal"]["data"] = [str(write_jsonl(tmp_path / "odd.jsonl", [{"text": "no prompt"}]))]
    config["region"] = {"layers": "9"}
    config["eval"]["speciality"][0]["path"] = str(tmp_path / "gone.jsonl")
    assert run_command(monkeypatch, "config", "validate", write_config(config)) == 2
    said = capsys.readouterr().err
    assert "4 mistakes in the config" in said
    assert all(name in said for name in ("none.jsonl", "odd.jsonl:1", "gone.jsonl", "layers"))
