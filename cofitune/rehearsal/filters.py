"""Which of the base's answers are worth learning again: empty ones, loops and, where asked, unfinished ones are not."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY, LOOP, UNFINISHED = "empty answer", "answer repeats itself", "answer not finished"
NGRAM = 4
FEWEST = 16  # tokens below which a repetition is no loop: a short list, a refrain


def why_dropped(text: str, ids: Sequence[int], ended: bool, max_repetition: float, unfinished: str) -> str | None:
    """Why an answer is left out of rehearsal; None where it stays.

    Args:
        text: the answer without special tokens.
        ids: its tokens.
        ended: whether the model ended it by itself, before `max_new_tokens`.
        max_repetition: the largest `repetition` that is no loop.
        unfinished: keep | drop.
    """
    if not text.strip():
        return EMPTY
    if len(ids) >= FEWEST and repetition(ids) > max_repetition:
        return LOOP
    if not ended and unfinished == "drop":
        return UNFINISHED
    return None


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """The share of a sequence's n-grams that stood in it before, from 0 (all differ) to almost 1; 0 of fewer than n.

    Example:
        >>> round(repetition([1, 2, 3, 4, 1, 2, 3, 4]), 3)
        0.2
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
