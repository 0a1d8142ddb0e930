"""Micro-batches of whole items, and one gradient an item."""

from __future__ import annotations

import random

import pytest
import torch

from cofitune.importance.by_item import ITEMS, count_items, item_batches, items_of_rows, sum_by_item


@pytest.mark.parametrize(
    ("lengths", "batch_size", "expected"),
    [
        ([1, 1, 1, 1, 1], 2, [2, 2, 1]),
        ([2, 1, 1, 2], 2, [2, 2, 2]),
        ([1, 2, 1], 2, [1, 2, 1]),
        ([5, 1, 1], 2, [5, 2]),
        ([1, 5], 4, [1, 5]),
        ([3], 1, [3]),
    ],
)
def test_no_item_is_parted(lengths: list[int], batch_size: int, expected: list[int]) -> None:
    begins = [place == 0 for length in lengths for place in range(length)]
    assert [len(batch) for batch in item_batches(begins, batch_size)] == expected


def test_any_items_fill_micro_batches_without_gap_and_as_full_as_they_can() -> None:
    chance = random.Random(7)
    for _ in range(200):
        lengths = [chance.choice([1, 1, 1, 2, 3, 7]) for _ in range(chance.randint(1, 30))]
        size = chance.randint(1, 6)
        begins = [place == 0 for length in lengths for place in range(length)]
        batches = item_batches(begins, size)
        assert [place for batch in batches for place in batch] == list(range(len(begins)))
        assert all(begins[batch.start] for batch in batches)
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            assert len(batch) <= size or sum(begins[batch.start : batch.stop]) == 1
            if following is not None:
                next_item = next((n for n in following if n > following.start and begins[n]), following.stop)
                assert next_item - batch.start > size, "the next item would have fitted"


def test_an_items_gradient_is_the_sum_of_its_rows() -> None:
    gradient = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": torch.zeros(5, 2), ITEMS: items_of_rows([True, False, True, False, False])}
    assert count_items(batch) == 2
    expected = torch.stack([gradient[:, :2].sum(1), gradient[:, 2:].sum(1)], dim=1)
    torch.testing.assert_close(sum_by_item(gradient, batch), expected)
    each = {"input_ids": batch["input_ids"], ITEMS: items_of_rows([True] * 5)}
    assert torch.equal(sum_by_item(gradient, each), gradient)
    assert torch.equal(sum_by_item(gradient, {"input_ids": batch["input_ids"]}), gradient)
