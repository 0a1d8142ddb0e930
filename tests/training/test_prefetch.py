"""One piece of work ahead: in order, one at a time, and a failure where its piece would have come."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cofitune.training.prefetch import one_ahead


def test_pieces_come_in_order_from_another_thread() -> None:
    here = threading.get_ident()
    made = list(one_ahead(range(5), lambda n: (n * n, threading.get_ident() != here)))
    assert made == [(n, (n * n, True)) for n in range(5)]
    assert list(one_ahead([], str)) == []


def test_the_next_piece_is_begun_and_none_after_it() -> None:
    taken: list[int] = []

    def work() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    pieces = one_ahead(work(), str)
    assert next(pieces) == (0, "0") and taken == [0, 1]
    pieces.close()  # type: ignore[attr-defined]
    assert taken == [0, 1], "a training that stops reads no further"


def test_a_failure_comes_with_its_piece_and_not_before() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("gone")
        return number

    pieces = one_ahead(range(4), make)
    assert [next(pieces)[1], next(pieces)[1]] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(pieces)
