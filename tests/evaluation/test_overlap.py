"""Prompts that a test asks, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cofitune.errors import DataError
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.overlap import TestItems
from tests.helpers import write_jsonl

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def items_of(folder: Path, *fields: dict[str, Any], **task: Any) -> TestItems:
    write_jsonl(folder / "t.jsonl", fields)
    return TestItems([EvalTask("law", "speciality", str(folder / "t.jsonl"), "generate", "f1", **task)])


@pytest.mark.parametrize("text", ["Who won, the Straße?", "who WON the strasse", '  Who won: "the\nStraße"!! '])
def test_case_punctuation_and_spaces_do_not_hide_a_question(tmp_path: Path, text: str) -> None:
    assert items_of(tmp_path, {"question": "Who won, the Straße?"}).task_of(text) == "law"


@pytest.mark.parametrize("text", ["Who won the", "Who won the case today", "won the case", "", "?!"])
def test_of_a_short_question_less_or_more_is_another_one(tmp_path: Path, text: str) -> None:
    assert items_of(tmp_path, {"question": "Who won the case?"}).task_of(text) is None


def test_thirteen_words_in_a_row_give_a_longer_text_away(tmp_path: Path) -> None:
    result = items_of(tmp_path, {"prompt": f"Read this: {LONG}."})
    words = LONG.split()
    assert result.task_of("Well, " + " ".join(words[:13]) + " and so on") == "law"
    assert result.task_of("Well, " + " ".join(words[1:]) + " and so on") == "law"
    assert result.task_of("Well, " + " ".join(words[:12]) + " and so on") is None
    assert result.task_of(" ".join([*words[:7], "else", *words[7:]])) is None


def test_an_instruction_counts_with_its_input_as_it_is_asked(tmp_path: Path) -> None:
    result = items_of(tmp_path, {"instruction": "Who won?", "input": "Case 1.", "output": "the buyer"})
    assert result.task_of("who won\ncase 1") == "law"
    assert result.task_of("who won") is None


def test_items_beyond_a_tasks_limit_count_as_well(tmp_path: Path) -> None:
    assert items_of(tmp_path, {"question": "Who won?"}, {"question": "Who lost?"}, limit=1).task_of("who lost") == "law"


def test_items_of_the_harness_and_of_drift_are_not_read_and_the_first_told(tmp_path: Path) -> None:
    harness = EvalTask("arc_easy", "gen_rs", "", "harness", "", harness="arc_easy")
    drift = EvalTask("drift", "drift", str(tmp_path / "nowhere"), "drift", "drift")
    assert TestItems([harness, drift]).unread == ["arc_easy"]


def test_a_missing_file_of_a_task_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such data file"):
        TestItems([EvalTask("law", "speciality", str(tmp_path / "nowhere.jsonl"), "generate", "f1")])
