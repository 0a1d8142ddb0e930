"""Numbers, durations and plurals as every report writes them."""

from __future__ import annotations

import pytest

from cofitune.reports.text import duration, many, number, signed


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(12.34, 1, "12.3"), (-0.44, 1, "−0.4"), (-0.04, 1, "0.0"), (-1.2346, 3, "−1.235"), (None, 1, "–")],
)
def test_a_number_has_a_true_minus_and_none_where_it_rounds_to_nothing(
    value: float | None, digits: int, text: str
) -> None:
    assert number(value, digits) == text


def test_a_change_has_a_sign_unless_it_rounds_to_nothing() -> None:
    assert [signed(v) for v in (1.23, -0.31, 0.04, -0.04, None)] == ["+1.2", "−0.3", "0.0", "0.0", "none (no task)"]


def test_a_count_has_its_noun() -> None:
    assert [many(n, "step") for n in (0, 1, 2, 2000)] == ["0 steps", "1 step", "2 steps", "2,000 steps"]


def test_a_duration_is_as_exact_as_it_is_long() -> None:
    assert [duration(s) for s in (39.2, 119, 733, 12_245)] == ["40 s", "119 s", "0:12:10", "3:24:00"]
