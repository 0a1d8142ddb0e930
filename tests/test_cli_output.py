"""`--json`, `-q`, `-v`, `--log-file` and NO_COLOR: of every command, whatever libraries print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cofitune.cli import app
from cofitune.cli_output import Output
from tests.helpers import run_command, write_config, write_jsonl


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    data = write_jsonl(tmp_path / "d.jsonl", ({"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(4)))
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(data)},
        "region": {"layers": "1", "modules": "ffn"},
        "train": {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }


def test_every_command_has_the_options_and_hidden_ones_have_not() -> None:
    group: Any = typer.main.get_command(app)
    for raw in group.commands.values():
        names = {p.name for p in raw.params}
        assert ({"as_json", "quiet", "verbose", "log_file"} <= names) == (
            not raw.hidden and not hasattr(raw, "commands")
        )


def test_json_is_the_plan_then_the_result_then_the_error(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_config(config)
    assert run_command(monkeypatch, "train", path, "--dry-run", "--json") == 0
    out, err = capfd.readouterr()
    plan = json.loads(out)
    assert plan["command"] == "train" and plan["dry_run"] and plan["plan"]["steps"] == 2
    assert "trainable parameters" in err and "--resume continues" in err and not (tmp_path / "run").exists()
    log = tmp_path / "logs/train.log"
    assert run_command(monkeypatch, "train", path, "--json", "--log-file", log) == 0
    result = json.loads(capfd.readouterr().out)
    assert Path(result["delta"]).is_file() and result["exit_code"] == 0 and result["steps"] == 2
    assert json.loads(Path(result["summary"]).read_text())["training"]["steps"] == 2
    assert "unchanged, bit for bit" in log.read_text() and "\x1b" not in log.read_text()
    assert run_command(monkeypatch, "train", path, "region.layers=9", "--json", "--log-file", log) == 2
    out, err = capfd.readouterr()
    assert "was made by another config" in json.loads(out)["error"] and "was made by another config" in err
    assert "error: " in log.read_text()
    assert run_command(monkeypatch, "train", path) == 0
    assert "already trained" in capfd.readouterr().out, "stdout is given back, and json was that command's alone"


def test_json_of_the_commands_around_a_run_is_one_object(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, written = write_config(config), tmp_path / "new.yaml"

    def typed(*words: object) -> dict[str, Any]:
        code = run_command(monkeypatch, *words, "--json")
        result: dict[str, Any] = json.loads(capfd.readouterr().out)
        assert result["exit_code"] == code
        return result

    shown = typed("config", "show", path, "train.seed=7")
    assert shown["command"] == "config show" and shown["config"]["train"]["seed"] == 7
    origins = shown["origins"]
    assert origins["train.seed"] == "override 'train.seed=7'" and origins["data.max_length"] == "default"
    checked = typed("config", "validate", path)
    assert checked["valid"] and any("4 layers" in line for line in checked["ok"])
    wrong = typed("config", "validate", path, "region.layers=99", "data.train=none.jsonl")
    assert wrong["exit_code"] == 2 and len(wrong["problems"]) == 2
    assert typed("config", "schema", "--of", "suite")["schema"]["title"] == "cofitune suite"
    assert "full" in [one["name"] for one in typed("list", "methods")["names"]]
    assert {"python", "torch", "cache"} <= set(typed("env")["environment"])
    made = typed("init", "--model", config["model"]["name"], "--data", config["data"]["train"], "--to", written)
    assert made["files"] == [made["config"]] == [str(written)] and written.is_file()


def test_json_tells_what_the_command_lines_parser_refuses(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (("train",), "Missing argument 'CONFIG.yaml'"),
        (("train", "c.yaml", "--nonsense"), "No such option"),
        (("train", "c.yaml", "--train.learning_rate", "1e-4"), "train.learning_rate=VALUE"),
    ):
        assert run_command(monkeypatch, *words, "--json") == 2
        result = json.loads(capfd.readouterr().out)
        assert result["command"] == "train" and message in result["error"]


def test_quiet_says_nothing_but_errors(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_config(config)
    assert run_command(monkeypatch, "train", path, "--dry-run", "-q") == 0
    assert capfd.readouterr().out == ""
    assert run_command(monkeypatch, "train", path, "region.layers=9", "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    assert run_command(monkeypatch, "train", path, "region.layers=9", "-v") == 2
    assert "Traceback" in capfd.readouterr().err


def test_a_log_that_cannot_be_written_is_a_message(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(monkeypatch, "train", write_config(config), "--log-file", tmp_path / "file/log") == 2
    assert "--log-file" in capfd.readouterr().err


def test_a_line_stands_in_the_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    assert run_command(monkeypatch, "list", "suites", "--log-file", log) == 0
    assert log.read_text().count("The paper's four specialities") == 1


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for no_color, colours in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        Output().console().print("[red]word")
        assert ("\x1b[31m" in capsys.readouterr().out) == colours
