"""The model class behind the harness: where an answer stops, behind reasoning as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cofitune.evaluation.harness.model import RowStops

ROWS = ("<think>a\n\nb</think>four\n", "<think>a\n\nb", "<think>a</think>four", "four\n")


@pytest.mark.parametrize(
    ("think_end", "expected"), [(None, [True, True, False, True]), ("</think>", [True, False, False, False])]
)
def test_a_stop_string_counts_behind_the_reasoning_alone(
    tiny_tokenizer: Any, think_end: str | None, expected: list[bool]
) -> None:
    rows = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ROWS]
    for row, done in zip(rows, expected, strict=True):
        stops = RowStops(tiny_tokenizer, ["\n"], 1, think_end)
        assert stops(torch.tensor([[0, *row]]), None).tolist() == [done]
        assert stops.stand_in([*row, *row[:1]]) == done, "also when more was written since"


def test_reasoning_may_end_with_a_special_token(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    for text, done in (("a\nb<|im_start|>four\n", True), ("a\nb<|im_start|>four", False), ("a\nb\n", False)):
        row = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        stops = RowStops(tiny_tokenizer, ["\n"], 1, end)
        assert stops(torch.tensor([[0, *row]]), None).tolist() == [done] == [stops.stand_in(row)]
