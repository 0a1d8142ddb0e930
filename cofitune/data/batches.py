"""Batches: padding, and the order in which examples fill the optimizer steps, the same on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cofitune.data.chat import IGNORED, Example

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How many examples an optimizer step takes and how many steps there are.

    Attributes:
        micro_batch: examples a micro-batch on one rank.
        accumulation: micro-batches a step on one rank.
        world_size: ranks.
        num_examples: examples in the data.
        num_steps: optimizer steps of the whole training.
    """

    micro_batch: int
    accumulation: int
    world_size: int
    num_examples: int
    num_steps: int

    @property
    def per_step(self) -> int:
        """Examples an optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def num_epochs(self) -> int:
        """Passes over the data, a begun one counted whole."""
        return math.ceil(self.num_steps / math.ceil(self.num_examples / self.per_step))


def plan_steps(
    num_examples: int, micro_batch: int, accumulation: int, world_size: int, epochs: float, max_steps: int | None
) -> Plan:
    """Count the optimizer steps: `max_steps` where given, else `epochs` passes, whose last step may be smaller."""
    per_epoch = math.ceil(num_examples / (micro_batch * accumulation * world_size))
    num_steps = max_steps if max_steps is not None else max(1, math.ceil(per_epoch * epochs))
    return Plan(micro_batch, accumulation, world_size, num_examples, num_steps)


def step_indices(plan: Plan, seed: int) -> Iterator[list[int]]:
    """Yield the example indices of each optimizer step: every epoch a fresh permutation, drawn from (seed, epoch)."""
    step = 0
    epoch = 0
    while step < plan.num_steps:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)  # a prime keeps seeds' epochs apart
        order = torch.randperm(plan.num_examples, generator=generator).tolist()
        for start in range(0, plan.num_examples, plan.per_step):
            if step == plan.num_steps:
                return
            yield order[start : start + plan.per_step]
            step += 1
        epoch += 1


def rank_micro_batches(
    examples: Sequence[Example], indices: Sequence[int], plan: Plan, rank: int, pad_token_id: int
) -> list[Batch]:
    """One rank's micro-batches of one step, exactly `accumulation` of them.

    The step's examples are dealt out in turn, so that a smaller last step leaves ranks nearly equal. A micro-batch
    without an example still has one row, without labels: every rank runs the same number of forwards (ZeRO-3 hangs
    otherwise) and contributes nothing with it. `indices` in a batch names the example of each row, int64 [B].
    """
    mine = indices[rank :: plan.world_size]
    batches = []
    for number in range(plan.accumulation):
        part = mine[number :: plan.accumulation]
        rows = [examples[i] for i in part] or [_silent(examples[indices[0]])]
        batches.append(collate(rows, pad_token_id) | {"indices": torch.tensor(part or [indices[0]])})
    return batches


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad on the right. Returns input_ids, attention_mask and labels, each int64 [B, T]; padding has label -100."""
    longest = max(len(e.input_ids) for e in examples)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)

    return {
        "input_ids": padded([e.input_ids for e in examples], pad_token_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
    }


def count_supervised(batch: Batch) -> int:
    """Tokens of a batch that carry the loss (the first position is never predicted)."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _silent(example: Example) -> Example:
    return Example(example.input_ids, [IGNORED] * len(example.input_ids))
