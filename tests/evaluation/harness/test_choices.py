"""Choices take turns: of each question one at a time, so that its keys and values are never copied for them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from cofitune.evaluation.harness.choices import choice_turns, grows_by_copies


def cache_of(config: MistralConfig | None) -> Any:
    cache = DynamicCache(config=config) if config else DynamicCache()
    for layer in range(2):
        cache.update(torch.ones(3, 2, 4, 8), torch.ones(3, 2, 4, 8), layer)
    return cache


@pytest.mark.parametrize("rows", [[0, 0, 0, 1, 1, 2], [0, 1, 2], [2, 0, 1, 0, 2, 2]])
def test_every_choice_has_a_turn_and_no_question_two_in_one(rows: list[int]) -> None:
    turns = choice_turns(rows, cache_of(None))
    assert sorted(n for turn in turns for n in turn) == list(range(len(rows)))
    assert len(turns) == max(rows.count(row) for row in rows)
    for turn in turns:
        assert [rows[n] for n in turn] == sorted({rows[n] for n in turn})
    assert [rows[n] for n in turns[0]] == [0, 1, 2], "the first of each needs no copy"


def test_a_window_that_moves_on_runs_all_choices_at_once() -> None:
    windows = cache_of(MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert not grows_by_copies(windows) and grows_by_copies(cache_of(None))
    assert choice_turns([0, 0, 1], windows) == [[0, 1, 2]]
