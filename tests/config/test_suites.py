"""The suites that come along: what they name exists, and the data folder's items can be asked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import load_config
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.tasks import load_tasks
from cofitune.recipes.from_config import eval_tasks

SUITES = Path(__file__).parents[2] / "configs/suites"
DATA = os.environ.get("COFITUNE_DATA", "")


def load(folder: Path, name: str, *overrides: str) -> Any:
    path = folder / "c.yaml"
    path.write_text(f"model: {{name: some/model}}\noutput_dir: runs/x\neval: {{suite: {SUITES / name}.yaml}}\n")
    return load_config(path, list(overrides))


@pytest.mark.parametrize("name", ["paper", "folder", "quick"])
def test_each_suite_has_tasks_in_every_category(tmp_path: Path, name: str) -> None:
    tasks = eval_tasks(load(tmp_path, name, "eval.data=d").eval)
    assert {task.category for task in tasks} == {"speciality", "gen_kn", "gen_rs", "instruct"}
    assert len({task.title for task in tasks}) == len(tasks)
    assert all(task.path.startswith("d/") or task.harness for task in tasks)


@pytest.mark.parametrize("name", ["folder", "quick"])
def test_the_limits_of_a_suite_can_be_raised_at_once(tmp_path: Path, name: str) -> None:
    tasks = eval_tasks(load(tmp_path, name, "eval.data=d").eval)
    assert all(task.limit is not None for task in tasks)
    assert {task.limit for task in eval_tasks(load(tmp_path, name, "eval.limit=1000").eval)} == {1000}
    assert {task.title for task in tasks if task.on_bad_item == "drop"} == {"ifeval"}, "nothing else is dropped"


def test_the_harness_has_the_tasks_of_the_paper_suite(tmp_path: Path) -> None:
    import lm_eval.tasks

    names = {task.harness for task in eval_tasks(load(tmp_path, "paper").eval) if task.harness}
    says = re.compile(r"^(?:task|group):\s*(\w+)\s*$", re.MULTILINE)
    folder = Path(lm_eval.tasks.__file__).parent
    files = [
        p for top in ("mmlu", "triviaqa", "bbh", "arc", "hellaswag", "ifeval") for p in (folder / top).rglob("*.yaml")
    ]
    assert names <= {name for path in files for name in says.findall(path.read_text(encoding="utf-8"))}


@pytest.mark.skipif(not Path(DATA, "mmlu/test.jsonl").is_file(), reason="COFITUNE_DATA names no folder of data")
@pytest.mark.parametrize("name", ["folder", "quick"])
def test_the_items_of_a_data_folder_can_be_asked(tmp_path: Path, name: str) -> None:
    tasks = eval_tasks(load(tmp_path, name, f"eval.data={DATA}", "eval.limit=1000").eval)
    loaded: dict[str, LoadedTask] = {task.task.title: task for task in load_tasks(tasks)}
    unusable = {title: len(task.unusable) for title, task in loaded.items() if task.unusable}
    assert unusable.keys() <= {"ifeval"}  # where NLTK's table is missing
    assert len(loaded["ifeval"].items) + unusable.get("ifeval", 0) == 541
    assert len(loaded["mmlu"].items) == 1000
