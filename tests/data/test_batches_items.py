"""Items of several examples: a random part of a source is drawn item by item."""

from __future__ import annotations

import torch

from cofitune.data.batches import Mixture


def test_a_part_of_a_source_takes_items_whole() -> None:
    begins = (0, 3, 4, 9, 10, 12)  # items of 3, 1, 5, 1, 2 and 4 examples
    mixture = Mixture((16,), (0.5,), (begins,))
    item_of = [sum(start <= index for start in begins) - 1 for index in range(16)]
    seen: set[int] = set()
    for seed in range(40):
        drawn = mixture.epoch(torch.Generator().manual_seed(seed)).tolist()
        assert len(drawn) == len(set(drawn)) == mixture.per_epoch == 8
        sizes = [3, 1, 5, 1, 2, 4]
        items = [item_of[index] for index in drawn]
        partial = [item for item in set(items) if items.count(item) < sizes[item]]
        assert len(partial) <= 1, "only the last item may be cut, so that every epoch has as many examples"
        seen |= set(drawn)
    assert seen == set(range(16))


def test_single_examples_are_drawn_as_they_always_were() -> None:
    def epoch(mixture: Mixture) -> list[int]:
        return [int(i) for i in mixture.epoch(torch.Generator().manual_seed(3))]

    plain = epoch(Mixture((10, 6), (0.5, 1.5)))
    assert epoch(Mixture((10, 6), (0.5, 1.5), ((), ()))) == plain
    assert epoch(Mixture((10, 6), (0.5, 1.5), (tuple(range(10)), ()))) == plain
