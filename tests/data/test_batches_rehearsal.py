"""Rehearsal in the steps: how many items, in which order, and which stored row belongs to which label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch

from cofitune.data.batches import (
    Batch,
    Plan,
    RehearsalMix,
    count_positions,
    count_rehearsed,
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

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(e.input_ids) for e in self])


def task_items() -> Listed:
    return Listed(Example([i + 1] * (4 + i % 5), [IGNORED, *[i + 1] * (3 + i % 5)]) for i in range(TASK))


def rehearsal_items(with_top_k: bool = True) -> Listed:
    """Token t of item i is 1000 + 20·i + t, and so are the first index and the rest of what is stored at it."""
    items = Listed()
    for i in range(REHEARSED):
        length, prompt = 5 + (3 * i) % 8, 2 + i % 3
        ids = [1000 + 20 * i + t for t in range(length)]
        answer = torch.tensor(ids[prompt:])
        indices = answer.to(torch.int32)[:, None] + torch.arange(K, dtype=torch.int32)
        stored = TopK(indices, -indices.float(), answer.float()) if with_top_k else None
        items.append(Example(ids, [IGNORED] * prompt + ids[prompt:], rehearsed=True, top_k=stored))
    return items


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
    """A step of eight takes two, the short one of five at an epoch's end takes one; nothing begins anew there."""
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
        dealt: Counter[int] = Counter()
        rehearsed = 0
        for rank in range(world_size):
            batches = rank_micro_batches(examples, indices, plan, rank, 0)
            assert len(batches) == plan.accumulation and all("rehearsed" in b for b in batches)
            rehearsed += sum(map(count_rehearsed, batches))
            dealt.update(i for b in batches if count_supervised(b) for i in b["indices"].tolist())
        assert dealt == Counter(indices)
        assert rehearsed == sum(examples[i].num_supervised for i in indices if i >= TASK)


def check_rows(batch: Batch, mine: Sequence[Example]) -> None:
    """Every rehearsed label is marked, no other is, and row n of what is stored is that of the n-th of them."""
    labels, marks = batch["labels"], batch["rehearsed"]
    assert marks.shape == labels.shape and marks.dtype == torch.bool
    assert torch.equal(marks, labels >= 1000), "of this test's tokens, the rehearsed ones are those above 1000"
    assert not marks[:, 0].any(), "the first position is never predicted"
    expected = labels[:, 1:][marks[:, 1:]]  # row by row, as the loss takes the logits
    if not any(e.rehearsed for e in mine):
        assert "top_k_rest" not in batch and not len(expected)
        return
    assert torch.equal(batch["top_k_rest"], expected.float())
    assert torch.equal(batch["top_k_indices"], expected.to(torch.int32)[:, None] + torch.arange(K, dtype=torch.int32))
    assert torch.equal(batch["top_k_log_probs"], -batch["top_k_indices"].float())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stored_rows_lie_in_the_order_of_the_labels(world_size: int) -> None:
    examples = [*task_items(), *rehearsal_items()]
    plan = plan_of(world_size)
    kinds = set()
    for indices in step_indices(plan, 3):
        for rank in range(world_size):
            for batch in rank_micro_batches(examples, indices, plan, rank, 0):
                mine = [examples[i] for i in batch["indices"].tolist()]
                check_rows(batch, mine if count_supervised(batch) else [])
                kinds.add((any(e.rehearsed for e in mine), all(e.rehearsed for e in mine)))
    assert (True, False) in kinds, "mixed micro-batches"
    assert world_size == 1 or (False, False) in kinds, "and such without rehearsal"


@pytest.mark.parametrize("flat", [False, True])
def test_stored_rows_lie_in_the_order_of_the_labels_in_packs_too(flat: bool) -> None:
    task, rehearsed = task_items(), rehearsal_items()
    packs = [
        *(join([task[i] for i in part]) for part in ((0, 5), (1,), (2, 3, 4), (6, 7), (8, 9, 10), (11, 12))),
        *Packs(rehearsed, [np.array(part) for part in ((0, 3, 6), (1, 2), (4,), (5,))]),
    ]
    assert [len(p.parts) for p in packs[6:]] == [3, 2, 1, 1] and all(
        p.rehearsed == (n > 5) for n, p in enumerate(packs)
    )
    plan = plan_steps(6, 2, 1, 2, 3, None, flat, RehearsalMix(6, 4, 0.4))
    mixed = 0
    for indices in step_indices(plan, 1):
        for rank in range(2):
            (batch,) = rank_micro_batches(packs, indices, plan, rank, 0)
            mine = [packs[i] for i in batch["indices"].tolist()]
            check_rows(batch, mine)
            mixed += len({p.rehearsed for p in mine}) == 2
            lengths = [n for p in mine for n in p.parts]
            assert int((batch["position_ids"] == 0)[batch["attention_mask"].bool()].sum()) == len(lengths)
            assert batch["input_ids"].shape[0] == (1 if flat else len(mine))
    assert mixed > 0


def test_packing_rehearsed_items_loses_and_mixes_nothing() -> None:
    items = rehearsal_items()
    pack = join([items[2], items[0], items[5]])
    assert pack.rehearsed and pack.top_k is not None
    assert [int(r) for r in pack.top_k.rest] == [label for label in pack.labels if label != IGNORED]
    assert len(pack.top_k) == sum(items[i].num_supervised for i in (2, 0, 5))
    assert join(rehearsal_items(with_top_k=False)).top_k is None
    assert not join(task_items()[:2]).rehearsed


def test_without_stored_probabilities_the_rehearsed_tokens_are_marked_alone() -> None:
    examples = [*task_items(), *rehearsal_items(with_top_k=False)]
    (batch,) = rank_micro_batches(
        examples, [0, 14, 3, 16], Plan(4, 1, 1, TASK, 1, rehearsal=RehearsalMix(13, 7, 0.5)), 0, 0
    )
    assert torch.equal(batch["rehearsed"], batch["labels"] >= 1000) and "top_k_rest" not in batch
    assert count_rehearsed(batch) == examples[14].num_supervised + examples[16].num_supervised


def test_a_rank_without_an_item_gets_a_silent_row_that_is_not_rehearsed() -> None:
    """Also where the shortest item, which the row is made of, is a rehearsed one."""
    examples = [*task_items(), *rehearsal_items()]
    plan = Plan(1, 2, 2, TASK, 1, rehearsal=RehearsalMix(TASK, REHEARSED, 0.2))
    batches = [b for rank in range(2) for b in rank_micro_batches(examples, [4, TASK], plan, rank, 0)]
    silent = [b for b in batches if not count_supervised(b)]
    assert len(silent) == 2 and all(len(b["input_ids"]) == 1 and b["indices"].tolist() == [TASK] for b in silent)
    assert all(not b["rehearsed"].any() and "top_k_rest" not in b for b in silent)


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
