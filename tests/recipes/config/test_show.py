"""`cofitune config show`: it loads to the same config, and says of each value where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.config.load import load_config, read_config
from cofitune.recipes.config.show import show_config
from tests.helpers import run_command

TEXT = """model: {name: 'a # b'}
output_dir: runs/x
data:
  train:
    - a.jsonl
    - {path: b.jsonl, weight: 2}
train:
  learning_rate: 1e-4
eval: {speciality: [{path: law/test.jsonl, kind: generate}]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("given_only", [False, True])
def test_what_is_shown_loads_to_the_same_config(config: Path, tmp_path: Path, given_only: bool) -> None:
    overrides = ["eval.suite=quick", "train.adam_betas=[0.8, 0.9]", "deepspeed.raw={steps_per_print: 5}"]
    again = tmp_path / "again.yaml"
    again.write_text(show_config(read_config(config, overrides), given_only), encoding="utf-8")
    assert load_config(again) == load_config(config, overrides)


def test_each_value_says_where_it_comes_from(config: Path) -> None:
    shown = show_config(read_config(config, ["train.seed=7", "eval.suite=quick"]))
    origins = {line.split("  # ")[0].strip(): line.split("  # ")[-1] for line in shown.splitlines()}
    assert origins["learning_rate: 0.0001"] == f"{config}:8"
    assert origins["seed: 7"] == "override 'train.seed=7'"
    assert origins["warmup_ratio: 0.03"] == "default"
    assert origins["- path: a.jsonl"] == f"{config}:5" and origins["weight: 2.0"] == f"{config}:6"
    assert origins["weight: 1.0"] == "default", "a path alone says nothing of the weight"
    assert "suites/quick.yaml:" in origins["- path: mmlu/test.jsonl"]


def test_the_command_prints_what_was_given_alone(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "config", "show", config, "--given") == 0
    shown = capsys.readouterr().out
    assert "learning_rate" in shown and "warmup_ratio" not in shown and "default" not in shown
