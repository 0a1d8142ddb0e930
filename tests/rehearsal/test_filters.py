"""Which answers are worth learning again."""

from __future__ import annotations

import random

import pytest

from cofitune.rehearsal.filters import EMPTY, LOOP, UNFINISHED, repetition, why_dropped

LOOPING = [1, 2, 3] * 8


def slow_repetition(ids: list[int], n: int) -> float:
    """One n-gram after the other: has any before it the same tokens?"""
    repeated = total = 0
    for end in range(n, len(ids) + 1):
        total += 1
        repeated += any(ids[other - n : other] == ids[end - n : end] for other in range(n, end))
    return repeated / total if total else 0.0


def test_repetition_equals_a_search_among_all_n_grams_before() -> None:
    chance = random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(chance.choice([1, 2, 3, 50])) for _ in range(chance.randrange(60))]
        n = chance.randrange(1, 6)
        assert repetition(ids, n) == pytest.approx(slow_repetition(ids, n), abs=1e-12)


def test_an_empty_answer_is_left_out_whatever_ended_it() -> None:
    for text in ("", "  \n\t"):
        assert why_dropped(text, [9], True, 1.0, "keep") == EMPTY


def test_a_loop_is_left_out_above_the_limit_and_not_at_it() -> None:
    share = repetition(LOOPING)
    assert why_dropped("a", LOOPING, True, share, "keep") is None
    assert why_dropped("a", LOOPING, True, share - 1e-9, "keep") == LOOP


def test_a_short_refrain_is_no_loop() -> None:
    assert why_dropped("a", [1] * 15, True, 0.1, "keep") is None
    assert why_dropped("a", [1] * 16, True, 0.1, "keep") == LOOP


def test_an_unfinished_answer_stays_or_goes_as_asked() -> None:
    assert why_dropped("a", [1, 2], False, 0.5, "keep") is None
    assert why_dropped("a", [1, 2], False, 0.5, "drop") == UNFINISHED
    assert why_dropped("a", [1, 2], True, 0.5, "drop") is None
