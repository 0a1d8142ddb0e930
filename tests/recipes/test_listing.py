"""`cofitune list` and `cofitune env`: every name with a few words, and no secret among them."""

from __future__ import annotations

from typing import get_args

import pytest

from cofitune.config.eval import Task
from cofitune.config.shipped import shipped_names
from cofitune.model.layouts import FAMILIES, LAYOUTS
from cofitune.recipes.environment import describe
from cofitune.recipes.listing import KINDS, What, list_names
from tests.helpers import run_command


@pytest.mark.parametrize("what", get_args(What))
def test_every_name_has_a_few_words(what: What) -> None:
    names = list_names(what)
    assert names and all(name and len(about) > 5 for name, about in names)
    assert all(about.count("(") == about.count(")") for _, about in names), "none is cut inside brackets"


def test_methods_layouts_and_kinds_are_all_there() -> None:
    assert [name.split(" ")[0] for name, _ in list_names("methods")] == list(shipped_names("method"))
    assert FAMILIES.keys() == LAYOUTS.keys() and KINDS.keys() == Task.METRICS.keys()
    assert "Full fine-tuning" in dict(list_names("methods"))["full"]


def test_a_word_finds_the_harness_tasks() -> None:
    pytest.importorskip("lm_eval")
    assert ("arc_challenge", "task") in list_names("tasks", "arc_chall")
    names = [name for name, _ in list_names("tasks", "mmlu")]
    assert names[0] == "mmlu" and names[1].startswith("mmlu_") and not names[-1].startswith("mmlu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modells"], "no such list; did you mean 'models'?"),
        (["suites", "quick"], "a word is for `cofitune list tasks WORD`"),
    ],
)
def test_a_wrong_list_is_one_message(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "list", *words) == 2
    assert message in capsys.readouterr().err


def test_the_environment_tells_no_secret() -> None:
    rows = dict(describe({"HF_TOKEN": "hf_secret", "HF_HOME": "/cache", "OTHER": "x"}))
    assert rows["HF_TOKEN"] == "set (not shown)" and rows["HF_HOME"] == "/cache" and "OTHER" not in rows
    assert {"cofitune", "python", "torch", "transformers", "memory", "configs"} <= rows.keys()
    assert not any("hf_secret" in value for value in rows.values())
