"""A template that writes the date, over two days: a run keeps the day on which it began, in all commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofitune.config.day import VARIABLE
from tests.helpers import (
    read_delta,
    read_jsonl,
    read_manifest,
    run_command,
    run_train,
    same_tensors,
    train_interrupted,
    write_config,
    write_jsonl,
)

pytestmark = pytest.mark.processes

DATED = (
    "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FIRST, SECOND = "2026-01-07", "2026-02-01"


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path, eight_items: Path) -> dict[str, Any]:
    (tmp_path / "dated.jinja").write_text(DATED)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"Say {n}."} for n in ("one", "two", "three")))
    test = write_jsonl(tmp_path / "test.jsonl", [{"question": "Two plus two?", "choices": ["3", "4"], "answer": 1}])
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(eight_items), "max_length": 128, "template": str(tmp_path / "dated.jinja")},
        "rehearsal": {"data": str(prompts), "max_new_tokens": 5, "max_repetition": 1.0, "held_out": 0.3, "top_k": 0},
        "importance": {"data": str(prompts.with_name("general.jsonl"))},
        "train": {
            "max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 2, "rehearsal": {"share": 0.5},
            "learning_rate": 1e-2,
        },
        "eval": {"versatility": {"gen_kn": [{"path": str(test), "kind": "multiple_choice", "name": "sum"}]}},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def test_a_run_of_two_days_is_one_run(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    general = write_jsonl(tmp_path / "general.jsonl", [{"instruction": "Say hello.", "output": "Hello."}])
    monkeypatch.setenv(VARIABLE, FIRST)
    assert run_command(monkeypatch, "rehearse", write_config(config)) == 0
    train_interrupted(monkeypatch, config, after=3)

    monkeypatch.setenv(VARIABLE, SECOND)
    assert run_train(monkeypatch, config, "--resume") == 0
    assert read_manifest(run)["chat_template"]["day"] == FIRST
    assert (run / "day.txt").read_text() == f"{FIRST}\n"
    monkeypatch.setenv(VARIABLE, SECOND)
    assert run_command(monkeypatch, "eval", write_config(config)) == 0
    prompts = [row["prompt"] for file in (run / "eval" / "samples").rglob("*.jsonl") for row in read_jsonl(file)]
    assert len(prompts) == 2 and all("Today is 07 Jan 2026" in prompt for prompt in prompts), "base and run"
    monkeypatch.setenv(VARIABLE, SECOND)
    assert run_command(monkeypatch, "importance", write_config(config)) == 0
    about = json.loads((run / "importance" / "manifest.json").read_text())
    assert about["chat_template"]["day"] == FIRST and general.is_file()
    _ask_on_another_day(tmp_path, config, monkeypatch, capsys)
    monkeypatch.setenv(VARIABLE, SECOND)
    capsys.readouterr()
    assert run_command(monkeypatch, "rehearse", write_config(config)) == 0
    assert "is finished already" in capsys.readouterr().out

    whole = config | {"output_dir": str(tmp_path / "whole" / "run"), "data": config["data"] | {"date": FIRST}}
    rehearsed = {"rehearsal": {"share": 0.5, "path": str(run / "rehearsal")}}
    whole["train"] = config["train"] | rehearsed
    (tmp_path / "whole").mkdir()
    monkeypatch.setenv(VARIABLE, SECOND)
    assert run_train(monkeypatch, whole) == 0
    assert same_tensors(read_delta(run), read_delta(tmp_path / "whole" / "run")), "one day's tokens in all steps"

    late = config | {"output_dir": str(tmp_path / "late" / "run"), "train": config["train"] | rehearsed}
    (tmp_path / "late").mkdir()
    monkeypatch.setenv(VARIABLE, SECOND)
    capsys.readouterr()
    assert run_train(monkeypatch, late) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"made under the date {FIRST}" in message and f"here it is {SECOND}; set data.date: {FIRST}" in message
    assert run_train(monkeypatch, late, "data.template=chat") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "under another chat template" in message and "the date" not in message, "this one writes none"


def _ask_on_another_day(
    folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Name the run of the first day in the `eval.models` of a new one: base and run are asked alike, and it is told."""
    monkeypatch.setenv(VARIABLE, SECOND)
    asked = config["eval"] | {"models": [{"path": config["output_dir"], "name": "earlier"}]}
    other = config | {"eval": asked, "output_dir": str(folder / "other" / "run")}
    (folder / "other").mkdir()
    capsys.readouterr()
    assert run_command(monkeypatch, "eval", write_config(other)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"earlier: was trained under the date {FIRST}" in told and f"asked under {SECOND}; data.date={FIRST}" in told
    samples = (folder / "other" / "run" / "eval" / "samples").rglob("*.jsonl")
    prompts = [row["prompt"] for file in samples for row in read_jsonl(file)]
    assert len(prompts) == 2 and all("Today is 01 Feb 2026" in prompt for prompt in prompts), "asked alike"
    (folder / "alike").mkdir()
    alike = other | {"data": config["data"] | {"date": FIRST}, "output_dir": str(folder / "alike" / "run")}
    assert run_command(monkeypatch, "eval", write_config(alike), "--dry-run") == 0
    assert "trained under the date" not in capsys.readouterr().out


def test_another_day_does_not_continue_a_training(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["train"].pop("rehearsal")
    monkeypatch.setenv(VARIABLE, FIRST)
    train_interrupted(monkeypatch, config, after=3)
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume", f"data.date={SECOND}") == 2
    assert "is another training's checkpoint" in " ".join(capsys.readouterr().err.split())
