"""Rehearsal in the steps: how many items, in which order, and which stored row belongs to which label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from cofitune.data.batches import (
    Batch,
    Plan,
    RehearsalMix,
    count_positions,
    count_supervised,
    plan_steps,
    rank_micro_batches,
    step_indices,
)
from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import Packs, join
from cofitune.data.top_k import TopK

TASK, REHEARSED, K = 13, 7, 3


class Listed(list[Example]):
    """Examples with their lengths, as packing reads them."""

    def __init__(self, examples: Iterable[Example]) -> None:
        super().__init__(examples)
        self.lengths = np.array([len(e.input_ids) for e in self])

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index)


def task_items() -> Listed:
    return Listed(Example([i + 1] * (4 + i % 5), [IGNORED, *[i + 1] * (3 + i % 5)]) for i in range(TASK))


def rehearsal_items(with_top_k: bool = True) -> Listed:
    """Token t of item i is 1000 + 20·i + t, and so are the first index and the rest of what is stored at it."""
    items = []
    for i in range(REHEARSED):
        length, prompt = 5 + (3 * i) % 8, 2 + i % 3
        ids = [1000 + 20 * i + t for t in range(length)]
        answer = torch.tensor(ids[prompt:])
        indices = answer.to(torch.int32)[:, None] + torch.arange(K, dtype=torch.int32)
        stored = TopK(indices, -indices.float(), answer.float()) if with_top_k else None
        items.append(Example(ids, [IGNORED] * prompt + ids[prompt:], top_k=stored))
    return Listed(items)


def plan_of(world_size: int = 1, epochs: float = 3, **more: bool) -> Plan:
    """Eight items of the task a step."""
    mix = RehearsalMix(TASK, REHEARSED, 0.2)
    return plan_steps(TASK, 8 // world_size // 2, 2, world_size, epochs, None, rehearsal=mix, **more)


@pytest.mark.parametrize(
    ("share", "count", "beside"),
    [(0.2, 8, 2), (0.2, 32, 8), (0.5, 8, 8), (0.2, 1, 1), (0.01, 8, 1), (0.1, 16, 2), (0.75, 2, 6), (1 / 3, 8, 4)],
)
def test_a_share_of_a_steps_items_is_rehearsal_and_at_least_one(share: float, count: int, beside: int) -> None:
    mix = RehearsalMix(TASK, REHEARSED, share)
    assert mix.beside(count) == beside
    plan = Plan(count, 1, 1, 2 * count, 2, rehearsal=RehearsalMix(2 * count, REHEARSED, share))
    for indices in step_indices(plan, 0):
        assert sum(i >= 2 * count for i in indices) == beside and len(indices) == count + beside


def test_the_task_keeps_its_order_and_its_epochs_whatever_is_rehearsed() -> None:
    plan, alone = plan_of(), plan_steps(TASK, 4, 2, 1, 3, None)
    assert plan.num_steps == alone.num_steps == 6 and plan.num_epochs == 3
    assert [[i for i in step if i < TASK] for step in step_indices(plan, 5)] == list(step_indices(alone, 5))


def test_every_pass_over_the_rehearsal_takes_each_item_once_in_a_new_order() -> None:
    plan = plan_of(epochs=40)
    drawn = [i for step in step_indices(plan, 5) for i in step if i >= TASK]
    whole = len(drawn) // REHEARSED
    passes = [drawn[REHEARSED * n : REHEARSED * (n + 1)] for n in range(whole)]
    assert whole > 15 and all(sorted(p) == list(range(TASK, TASK + REHEARSED)) for p in passes)
    assert len({tuple(p) for p in passes}) > whole - 3


def test_the_rehearsal_goes_on_where_the_tasks_epoch_ends() -> None:
    """A step of eight takes two, the short one of five at an epoch's end takes one; nothing begins again there."""
    plan = plan_of()
    counts = [sum(i >= TASK for i in step) for step in step_indices(plan, 5)]
    assert counts == [2, 1] * 3
    drawn = [i for step in step_indices(plan, 5) for i in step if i >= TASK]
    assert drawn == list(islice(RehearsalMix(TASK, REHEARSED, 0.2).order(5), 9))
    assert sorted(drawn[:REHEARSED]) == list(range(TASK, TASK + REHEARSED)), "a pass ends in the third epoch"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_rehearses_the_same_on_any_number_of_ranks(world_size: int) -> None:
    examples = [*task_items(), *rehearsal_items()]
    steps = list(step_indices(plan_of(world_size), 3))
    assert steps == list(step_indices(plan_of(), 3)) == list(step_indices(plan_of(world_size), 3))
    assert steps != list(step_indices(plan_of(world_size), 4))
    plan = plan_of(world_size)
    for indices in steps:
        dealt: tuple[Counter[int], Counter[int]] = Counter(), Counter()
        for rank in range(world_size):
            batches = rank_micro_batches(examples, indices, plan, rank, 0)
            assert len(batches) == plan.accumulation + plan.rehearsal_micro_batches, "as many on every rank"
            assert all(len(b["input_ids"]) <= plan.micro_batch for b in batches)
            for number, batch in enumerate(batches):
                if count_supervised(batch):
                    dealt[number >= plan.accumulation].update(batch["indices"].tolist())
        assert dealt[0] == Counter(i for i in indices if i < TASK)
        assert dealt[1] == Counter(i for i in indices if i >= TASK)


@pytest.mark.parametrize(
    ("share", "micro_batch", "accumulation", "world_size", "micro_batches"),
    [(0.2, 4, 2, 1, 1), (0.2, 1, 2, 4, 1), (0.5, 4, 2, 1, 2), (0.5, 2, 2, 2, 2), (0.4, 4, 2, 1, 2), (0.75, 2, 1, 1, 3)],
)
def test_rehearsed_micro_batches_are_as_large_as_the_tasks_at_most(
    share: float, micro_batch: int, accumulation: int, world_size: int, micro_batches: int
) -> None:
    plan = Plan(micro_batch, accumulation, world_size, 99, 1, rehearsal=RehearsalMix(99, 9, share))
    assert plan.rehearsal_micro_batches == micro_batches
    assert Plan(micro_batch, accumulation, world_size, 99, 1).rehearsal_micro_batches == 0


def test_the_tasks_micro_batches_are_those_without_rehearsal() -> None:
    """Neither larger nor padded further: the answers are apart."""
    examples, plan, alone = [*task_items(), *rehearsal_items()], plan_of(), plan_steps(TASK, 4, 2, 1, 3, None)
    for indices, own in zip(step_indices(plan, 3), step_indices(alone, 3), strict=True):
        got, expected = (
            rank_micro_batches(examples, indices, plan, 0, 0),
            rank_micro_batches(examples, own, alone, 0, 0),
        )
        for one, other in zip(got[:2], expected, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def check_rows(batch: Batch) -> None:
    """Row n of what is stored is that of the n-th label, row by row, as the loss takes the logits."""
    labels = batch["labels"][:, 1:]
    expected = labels[labels != IGNORED]
    assert len(expected) and (expected >= 1000).all(), "of this test's tokens, the rehearsed ones are those above 1000"
    assert torch.equal(batch["top_k_rest"], expected.float())
    assert torch.equal(batch["top_k_indices"], expected.to(torch.int32)[:, None] + torch.arange(K, dtype=torch.int32))
    assert torch.equal(batch["top_k_log_probs"], -batch["top_k_indices"].float())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stored_rows_lie_in_the_order_of_the_labels(world_size: int) -> None:
    examples = [*task_items(), *rehearsal_items()]
    mix = RehearsalMix(TASK, REHEARSED, 0.5)
    plan = plan_steps(TASK, 8 // world_size // 2, 2, world_size, 3, None, rehearsal=mix)
    rows = set()
    for indices in step_indices(plan, 3):
        for rank in range(world_size):
            batches = rank_micro_batches(examples, indices, plan, rank, 0)
            assert all("top_k_rest" not in b for b in batches[: plan.accumulation])
            for batch in batches[plan.accumulation :]:
                if count_supervised(batch):
                    check_rows(batch)
                    rows.add(len(batch["input_ids"]))
    assert world_size == 4 or max(rows) > 1


@pytest.mark.parametrize("flat", [False, True])
def test_stored_rows_lie_in_the_order_of_the_labels_in_packs_too(flat: bool) -> None:
    task, rehearsed = task_items(), rehearsal_items()
    packs = [
        *(join([task[i] for i in part]) for part in ((0, 5), (1,), (2, 3, 4), (6, 7), (8, 9, 10), (11, 12))),
        *Packs(rehearsed, [np.array(part) for part in ((0, 3, 6), (1, 2), (4,), (5,))]),
    ]
    assert [len(p.parts) for p in packs[6:]] == [3, 2, 1, 1]
    plan = plan_steps(6, 4, 1, 1, 3, None, flat, RehearsalMix(6, 4, 0.4))
    assert plan.rehearsal is not None and plan.rehearsal.beside(4) == 3
    for indices in step_indices(plan, 1):
        task_batch, batch = rank_micro_batches(packs, indices, plan, 0, 0)
        mine = [packs[i] for i in batch["indices"].tolist()]
        check_rows(batch)
        assert "top_k_rest" not in task_batch
        starts = (batch["position_ids"] == 0) & batch["attention_mask"].bool()
        assert int(starts.sum()) == sum(len(p.parts) for p in mine)
        assert batch["input_ids"].shape[0] == (1 if flat else len(mine))
        assert count_supervised(batch) == sum(p.num_supervised for p in mine)


def test_packing_rehearsed_items_loses_and_mixes_nothing() -> None:
    items = rehearsal_items()
    pack = join([items[2], items[0], items[5]])
    assert pack.top_k is not None
    assert [int(r) for r in pack.top_k.rest] == [label for label in pack.labels if label != IGNORED]
    assert len(pack.top_k) == sum(items[i].num_supervised for i in (2, 0, 5))
    assert join(rehearsal_items(with_top_k=False)).top_k is None


def test_without_stored_probabilities_a_batch_holds_none() -> None:
    examples = [*task_items(), *rehearsal_items(with_top_k=False)]
    plan = Plan(2, 1, 1, TASK, 1, rehearsal=RehearsalMix(TASK, REHEARSED, 0.5))
    _, batch = rank_micro_batches(examples, [0, 14, 3, 16], plan, 0, 0)
    assert "top_k_rest" not in batch and sorted(batch["indices"].tolist()) == [14, 16]
    assert count_supervised(batch) == examples[14].num_supervised + examples[16].num_supervised


def test_a_rank_without_an_answer_gets_a_silent_row_of_one() -> None:
    examples = [*task_items(), *rehearsal_items()]
    plan = Plan(1, 2, 2, TASK, 1, rehearsal=RehearsalMix(TASK, REHEARSED, 0.2))
    batches = [b for rank in range(2) for b in rank_micro_batches(examples, [4, 5, 6, 7, TASK], plan, rank, 0)]
    assert [count_supervised(b) > 0 for b in batches] == [True, True, True, True, True, False]
    silent = batches[-1]
    assert len(silent["input_ids"]) == 1 and silent["indices"].tolist() == [TASK] and "top_k_rest" not in silent


def test_positions_count_the_rehearsal_too() -> None:
    examples = [*task_items(), *rehearsal_items()]
    for world_size in (1, 2):
        plan = plan_of(world_size)
        counted = sum(
            batch["input_ids"].numel()
            for indices in step_indices(plan, 3)
            for rank in range(world_size)
            for batch in rank_micro_batches(examples, indices, plan, rank, 0)
        )
        assert count_positions(plan, [len(e.input_ids) for e in examples], 3) == counted


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_by_stored_lengths_a_rank_reads_its_own_items_only(ranks: int) -> None:
    """And gets the batches that it gets by reading them all."""
    examples = Listed([*task_items(), *rehearsal_items()])
    read: list[int] = []

    class Watched(list[Example]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    plan = plan_steps(TASK, 2, 2, ranks, 1, 3, rehearsal=RehearsalMix(TASK, REHEARSED, 0.3))
    for indices in step_indices(plan, 7):
        read.clear()
        for rank in range(ranks):
            whole = rank_micro_batches(examples, indices, plan, rank, 0)
            own = rank_micro_batches(Watched(examples), indices, plan, rank, 0, lengths=examples.lengths.tolist())
            assert len(whole) == len(own)
            for one, other in zip(whole, own, strict=True):
                assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        silent = ranks * (plan.accumulation + plan.rehearsal_micro_batches) - len(indices)
        assert len(read) <= len(indices) + max(0, silent), "each is read once, and one for each silent row"
