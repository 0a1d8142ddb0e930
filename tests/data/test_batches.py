"""Every step holds the same examples on any number of ranks, and no rank ever misses a forward."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from cofitune.data.batches import Mixture, Plan, collate, count_supervised, plan_steps, rank_micro_batches, step_indices
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


@pytest.mark.parametrize("per_epoch, epochs, steps", [(100, 0.07, 7), (50, 0.14, 7), (100, 0.071, 8), (3, 1 / 3, 1)])
def test_a_fraction_of_an_epoch_is_not_a_step_too_long(per_epoch: int, epochs: float, steps: int) -> None:
    assert plan_steps(per_epoch, 1, 1, 1, epochs, None).num_steps == steps


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
    batches = rank_micro_batches(EXAMPLES, last, plan, rank=0, pad_token_id=0)
    assert [count_supervised(b) > 0 for b in batches] == [True, False]
    assert batches[1]["input_ids"].shape[0] == 1


def test_padding_is_on_the_right_unmasked_and_unlabelled() -> None:
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert count_supervised(batch) == 2, "the first token of an item is never predicted"


def test_weights_say_how_often_items_count() -> None:
    mixture = Mixture((10, 20, 7, 4), (1.0, 0.5, 2.0, 1.25))
    assert mixture.per_epoch == 10 + 10 + 14 + 5
    plan = plan_steps(mixture, 3, 2, 1, epochs=400, max_steps=None)
    per_epoch = plan.num_steps // 400
    steps = list(step_indices(plan, seed=7))
    counts: Counter[int] = Counter()
    halves = set()
    for epoch in range(400):
        visited = Counter(i for step in steps[per_epoch * epoch : per_epoch * (epoch + 1)] for i in step)
        assert sum(visited.values()) == mixture.per_epoch
        assert all(visited[i] == 1 for i in range(10)) and all(visited[i] == 2 for i in range(30, 37))
        assert sum(visited[i] for i in range(10, 30)) == 10 and max(visited[i] for i in range(10, 30)) == 1
        assert sorted(visited[i] for i in range(37, 41)) == [1, 1, 1, 2]
        halves.add(frozenset(i for i in range(10, 30) if visited[i]))
        counts += visited
    assert len(halves) > 390, "a fresh half every epoch"
    # each of the 20 is in 200 of the 400 halves, give or take five standard deviations (10 each)
    assert all(150 < counts[i] < 250 for i in range(10, 30))
    assert all(57 < counts[i] - 400 < 143 for i in range(37, 41))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_order_depends_on_the_seed_and_the_epoch_alone(world_size: int) -> None:
    mixture = Mixture((10, 20), (1.0, 0.3))
    plan = plan_steps(mixture, 8 // world_size // 2, 2, world_size, epochs=3, max_steps=None)
    assert plan.per_step == 8 and plan.num_steps == 6
    steps = list(step_indices(plan, 3))
    assert steps == list(step_indices(plan_steps(mixture, 8, 1, 1, 3, None), 3))
    assert steps != list(step_indices(plan, 4))


def test_one_source_of_weight_one_is_a_permutation() -> None:
    plan = plan_steps(13, 2, 2, 1, epochs=1, max_steps=None)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(5)).tolist()
    assert [i for step in step_indices(plan, 5) for i in step] == order


def test_a_step_is_dealt_by_length() -> None:
    lengths = [3, 30, 5, 28, 4, 29, 6, 27, 12, 13, 14, 15]
    examples = [Example([1] * n, [1] * n) for n in lengths]
    plan = Plan(2, 3, 2, 12, 1)
    dealt = [rank_micro_batches(examples, list(range(12)), plan, rank, 0) for rank in range(2)]
    assert sorted(i for rank in dealt for b in rank for i in b["indices"].tolist()) == list(range(12))
    rows = [[sorted(lengths[i] for i in b["indices"].tolist()) for b in rank] for rank in dealt]
    assert rows == [[[29, 30], [12, 13], [5, 6]], [[27, 28], [14, 15], [3, 4]]], "alike in a batch and on the ranks"
    padding = sum(int((b["attention_mask"] == 0).sum()) for rank in dealt for b in rank)
    assert padding == 6


@pytest.mark.parametrize("left_over", range(1, 9))
def test_a_small_last_step_leaves_ranks_nearly_equal(left_over: int) -> None:
    plan = Plan(2, 2, 2, 13, 2)
    counts = []
    for rank in range(2):
        batches = rank_micro_batches(EXAMPLES, list(range(left_over)), plan, rank, 0)
        assert len(batches) == 2 and all(b["input_ids"].shape[0] <= 2 for b in batches)
        counts.append(sum(b["indices"].numel() for b in batches if count_supervised(b)))
    assert sum(counts) == left_over and abs(counts[0] - counts[1]) <= 1
