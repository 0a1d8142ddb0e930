"""The command line itself: odd terminals and odd names end in a message, never in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cofitune import cli
from cofitune.errors import RepairWarning

TRAIN = [sys.executable, "-m", "cofitune", "train"]


def run(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRAIN, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **environment},
    )


def test_an_ascii_terminal_shows_the_plan_and_names_with_brackets(tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = tmp_path / "[bold]ä"
    folder.mkdir()
    (folder / "d.jsonl").write_text('{"instruction": "Say hi.", "output": "Hi!", "id": 1}\n')
    config = folder / "c.yaml"
    config.write_text(
        f"model: {{name: {tiny_model_folder}}}\noutput_dir: '{folder}/run'\ndata: {{train: '{folder}/d.jsonl'}}\n"
        "region: {layers: 0, modules: ffn}\n",
        encoding="utf-8",
    )
    done = run(str(config), "--dry-run", PYTHONIOENCODING="ascii", COLUMNS="60")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/[bold]\\xe4/run/train/" in done.stdout
    assert "id (1)" in done.stdout, "a key that nothing reads is told"


def test_an_override_of_odd_bytes_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {name: m}\noutput_dir: o\n")
    done = run(str(tmp_path / "c.yaml"), b"train.[b]\xff=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "override 'train.[b]\\udcff=1': train.[b]\\udcff: is a key that no text can hold" in done.stderr


def test_the_seeds_of_a_search_may_be_typed(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"instruction": "Say hi.", "output": "Hi!"}\n')
    config = tmp_path / "c.yaml"
    task = f"{{path: '{tmp_path}/d.jsonl', kind: generate, name: t}}"
    config.write_text(
        f"model: {{name: {tiny_model_folder}}}\noutput_dir: '{tmp_path}/run'\ndata: {{train: '{tmp_path}/d.jsonl'}}\n"
        f"eval: {{speciality: [{task}], versatility: {{gen_kn: [{task.replace('t}', 'k}')}]}}}}\n"
        "search: {levels: [{layers: [0-1, 2-3, 1-2]}], train_steps: 2}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "cofitune", "search", str(config), "--repeat", "3", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Then the 3 best are trained with 2 further seeds: 6 trials" in done.stdout


def test_a_note_is_said_once_though_a_library_changes_a_filter(capsys: pytest.CaptureFixture[str]) -> None:
    cli.NOTES_SAID.clear()
    for text in ("a is damaged", "a is damaged", "b is damaged"):  # Python would forget the first with the filters
        cli._show_warning(warnings.showwarning, RepairWarning(text), RepairWarning, "store.py", 1)
    assert capsys.readouterr().err == "note: a is damaged\nnote: b is damaged\n"
