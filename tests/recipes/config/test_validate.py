"""`cofitune config validate`: all that is wrong at once, what is missing apart from it, and nothing written."""

from __future__ import annotations

import importlib.util
import shutil
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": []}}, "data.train: no training items are named"),
        ({"region": "search"}, "region: `cofitune search` with this config finds it"),
        ({"softmask": {"apply_to": "update"}}, "softmask: `cofitune importance` makes "),
        ({"adapter": {"kind": "lora"}}, "lora on "),
        ({"search": {"levels": [{"layers": ["0-1"]}, {"modules": [["up_proj"]]}]}}, "2 levels"),
    ],
)
def test_what_other_commands_make_is_missing_and_the_rest_is_said(
    changes: dict[str, Any], message: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_command(monkeypatch, "config", "validate", write_config(config | changes)) == 0
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=4", "data.max_length: 4 tokens hold no item: "),
        (
            "model.attn_implementation=flash_attention_2",
            "flash_attention_2 needs flash-attn, which is not installed: pip",
        ),
        ("model.attn_implementation=flash_attention_4", "flash_attention_4 needs flash-attn-4, which is not installed"),
        ("search.levels=[{modules: [[upp]]}]", "search.levels.0: 'upp' names no module"),
        ("search.levels=[{layers: ['9-12']}]", "search.levels.0: "),
        ("output_dir=/", "output_dir: is the root of the file system"),
    ],
)
def test_what_the_next_command_refuses_is_not_called_valid(
    override: str,
    message: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(monkeypatch, "config", "validate", write_config(config), override) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and "valid;" not in output.out


def test_a_file_in_place_of_the_runs_folder_is_refused(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["output_dir"] = config["data"]["train"][0]
    assert run_command(monkeypatch, "config", "validate", write_config(config)) == 2
    assert f"output_dir: {config['output_dir']} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "override", "message"),
    [
        ("bitsandbytes", "train.optimizer=adamw_8bit", "adamw_8bit needs bitsandbytes"),
        ("mlflow", "train.report_to=mlflow", "train.report_to: mlflow is not installed"),
    ],
)
def test_a_package_that_training_needs_is_named(
    package: str,
    override: str,
    message: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert run_command(monkeypatch, "config", "validate", write_config(config), override) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_tokenizer_yet_is_missing_it(
    config: dict[str, Any],
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(tiny_model_folder / "config.json", tmp_path / "model")
    config["model"]["name"] = str(tmp_path / "model")
    assert run_command(monkeypatch, "config", "validate", write_config(config)) == 0
    assert "tokenizer" in capsys.readouterr().out
