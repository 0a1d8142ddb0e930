"""The choices of a question, asked one after another from the one cache of their question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer


def grows_by_copies(cache: Any) -> bool:
    """Whether new keys and values make new tensors, so that a context's own stay as they were."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def choice_turns(rows: Sequence[int], cache: Any) -> list[list[int]]:
    """Continuations, by their numbers, that run together: of each context one at a time, in the contexts' order.

    So memory holds the contexts' keys and values twice at most, however many choices there are. Where a cache cannot go
    back to its context, all run at once, each on a copy of its own.
    """
    if not grows_by_copies(cache):
        return [list(range(len(rows)))]
    turns: list[list[int]] = []
    begun = [0] * (max(rows) + 1)
    for number in sorted(range(len(rows)), key=lambda n: rows[n]):
        turn = begun[rows[number]]
        begun[rows[number]] += 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(number)
    return turns
