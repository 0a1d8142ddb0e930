"""Every step holds the same examples on any number of ranks, and no rank ever misses a forward."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from cofitune.data.batches import Plan, collate, count_supervised, plan_steps, rank_micro_batches, step_indices
from cofitune.data.chat import IGNORED, Example

EXAMPLES = [Example([i + 1] * (3 + i % 5), [IGNORED, *[i + 1] * (2 + i % 5)]) for i in range(13)]


def test_an_epoch_visits_every_example_once() -> None:
    plan = plan_steps(13, 2, 2, 1, epochs=3, max_steps=None)
    steps = list(step_indices(plan, seed=1))
    assert plan.num_steps == len(steps) == 12
    for epoch in range(3):
        visited = Counter(i for step in steps[4 * epoch : 4 * epoch + 4] for i in step)
        assert visited == Counter(range(13))
    assert steps[:4] != steps[4:8], "each epoch has an order of its own"


def test_max_steps_overrules_epochs_and_may_cut_one() -> None:
    assert plan_steps(13, 2, 2, 1, epochs=3, max_steps=5).num_steps == 5
    assert len(list(step_indices(plan_steps(13, 2, 2, 1, 3, 5), seed=1))) == 5
    assert plan_steps(13, 2, 2, 1, epochs=0.5, max_steps=None).num_steps == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_holds_the_same_examples_on_any_number_of_ranks(world_size: int) -> None:
    plan = Plan(8 // world_size // 2, 2, world_size, len(EXAMPLES), 4)
    for indices in step_indices(plan, seed=3):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            batches = rank_micro_batches(EXAMPLES, indices, plan, rank, pad_token_id=0)
            assert len(batches) == plan.accumulation, "every rank runs the same number of forwards"
            for batch in batches:
                for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                    if (labels != IGNORED).any():
                        seen[int(ids[0]) - 1] += 1
        assert seen == Counter(indices)
    whole = Plan(8, 1, 1, len(EXAMPLES), 4)
    assert list(step_indices(whole, 3)) == list(step_indices(plan, 3))


def test_a_rank_without_an_example_gets_a_silent_batch() -> None:
    plan = Plan(1, 2, 4, 13, 2)
    *_, last = islice(step_indices(plan, 0), 2)
    assert len(last) == 5
    batches = rank_micro_batches(EXAMPLES, last, plan, rank=3, pad_token_id=0)
    assert [count_supervised(b) > 0 for b in batches] == [True, False]
    assert batches[1]["input_ids"].shape[0] == 1


def test_padding_is_on_the_right_unmasked_and_unlabelled() -> None:
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert count_supervised(batch) == 2, "the first token of an item is never predicted"
