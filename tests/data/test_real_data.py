"""Real data sets, where a folder of them is at hand: they are read, labelled and asked without a complaint."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cofitune.data.chat import IGNORED, encode
from cofitune.data.read import make_item
from cofitune.data.sources import Source, open_source
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.tasks import load_tasks

DATA = Path(os.environ.get("COFITUNE_DATA", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("COFITUNE_DATA"), reason="COFITUNE_DATA names no folder of real data sets"
)


@pytest.mark.parametrize("name", ["law", "math", "finance", "cag", "medical"])
def test_training_items_are_read_and_their_responses_labelled(name: str, tiny_tokenizer: Any) -> None:
    rows = open_source(Source(str(DATA / name / "train.jsonl"))).rows()
    items = [make_item(where, row, "auto") for where, row in rows]
    assert len(items) > 1000
    for item in islice(items, 0, None, len(items) // 50):
        example = encode(item, tiny_tokenizer)
        learned = tiny_tokenizer.decode([label for label in example.labels if label != IGNORED])
        assert learned == item.turns[-1][1] + tiny_tokenizer.eos_token, item.where


@pytest.mark.parametrize(
    ("name", "kind", "metric"),
    [
        ("arc_easy", "multiple_choice", "acc"),
        ("openbookqa", "multiple_choice", "acc_norm"),
        ("mmlu", "multiple_choice", "acc"),
        ("law", "generate", "exact_match"),
        ("triviaqa", "generate", "exact_match"),
    ],
)
def test_test_items_are_tasks(name: str, kind: str, metric: str) -> None:
    path = str(DATA / name / "test.jsonl")
    task = EvalTask(name, "speciality", path, kind, metric, None, 16, (), None)
    (loaded,) = load_tasks([task])
    assert len(loaded.items) >= 500
