"""Batches: padding, and the order in which examples fill the optimizer steps, the same on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from itertools import count as count_up

import torch
from torch import Tensor

from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import join
from cofitune.data.top_k import TopK

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Mixture:
    """How often the examples of each source count in an epoch.

    Attributes:
        sizes: examples of each source, whose indices follow one another.
        weights: 1 is each example once an epoch, 2 is twice, 0.5 a fresh random half every epoch, 1.5 once and a
            fresh random half again.
        items: of each source, the indices within it at which an item begins: an item's examples follow one another, and
            a random part of a source is drawn item by item. Empty: each example is an item.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    items: tuple[tuple[int, ...], ...] = ()

    @property
    def per_epoch(self) -> int:
        """Examples an epoch, the same number in every epoch."""
        return sum(whole * size + part for size, (whole, part) in zip(self.sizes, self._counts(), strict=True))

    def epoch(self, generator: torch.Generator) -> Tensor:
        """The example indices of one epoch, int64 [per_epoch], drawn from `generator` and shuffled."""
        chosen, start = [], 0
        begins = self.items or ((),) * len(self.sizes)
        for size, items, (whole, part) in zip(self.sizes, begins, self._counts(), strict=True):
            chosen += [torch.arange(start, start + size)] * whole
            if part:
                chosen.append(start + _drawn(size, items, generator)[:part])
            start += size
        indices = torch.cat(chosen)
        return indices[torch.randperm(len(indices), generator=generator)]

    def _counts(self) -> list[tuple[int, int]]:
        """Of each source: whole passes, and examples of the part of a pass."""
        counts = []
        for size, weight in zip(self.sizes, self.weights, strict=True):
            whole = math.floor(weight)
            counts.append((whole, round((weight - whole) * size)))
        return counts


def _drawn(size: int, items: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A source's example indices in random order, those of an item one behind another; int64 [size]."""
    if len(items) in (0, size):
        return torch.randperm(size, generator=generator)
    bounds = [*items, size]
    order = torch.randperm(len(items), generator=generator).tolist()
    return torch.cat([torch.arange(bounds[item], bounds[item + 1]) for item in order])


@dataclass(frozen=True)
class RehearsalMix:
    """The rehearsal examples of each optimizer step, beside those of the task.

    Attributes:
        first: index of the first of them, behind all of the task's.
        size: how many there are.
        share: which part of a step's examples they are.
    """

    first: int
    size: int
    share: float

    def beside(self, count: int) -> int:
        """Rehearsal examples beside `count` of the task: at least one."""
        return max(1, round(count * self.share / (1 - self.share)))

    def order(self, seed: int) -> Iterator[int]:
        """Indices without end: every pass over them in a fresh order, drawn from (seed, pass)."""
        for number in count_up():
            generator = torch.Generator().manual_seed(seed + 15_485_863 * (number + 1))  # apart from the task's epochs
            yield from (self.first + torch.randperm(self.size, generator=generator)).tolist()


@dataclass(frozen=True)
class Plan:
    """How many examples an optimizer step takes and how many steps there are.

    Attributes:
        micro_batch: examples a micro-batch on one rank.
        accumulation: micro-batches a step on one rank.
        world_size: ranks.
        num_examples: examples an epoch.
        num_steps: optimizer steps of the whole training.
        mixture: the sources' parts in an epoch; None: every example once.
        flat: lay the packs of a micro-batch behind one another in one row, as FlashAttention wants them.
        rehearsal: what is trained beside the task's examples in each step; None: nothing.
    """

    micro_batch: int
    accumulation: int
    world_size: int
    num_examples: int
    num_steps: int
    mixture: Mixture | None = None
    flat: bool = False
    rehearsal: RehearsalMix | None = None

    @property
    def per_step(self) -> int:
        """Examples of the task an optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def rehearsal_micro_batches(self) -> int:
        """Micro-batches of rehearsal examples a step on one rank, behind those of the task.

        They are apart, so that the task's neither grow nor are padded to the length of the answers.
        """
        if self.rehearsal is None:
            return 0
        return math.ceil(self.rehearsal.beside(self.per_step) / (self.micro_batch * self.world_size))

    @property
    def num_epochs(self) -> int:
        """Passes over the data, a begun one counted whole."""
        return math.ceil(self.num_steps / math.ceil(self.num_examples / self.per_step))


def plan_steps(
    examples: int | Mixture,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    epochs: float,
    max_steps: int | None,
    flat: bool = False,
    rehearsal: RehearsalMix | None = None,
) -> Plan:
    """Count the optimizer steps: `max_steps` where given, else `epochs` passes, whose last step may be smaller."""
    mixture = examples if isinstance(examples, Mixture) else Mixture((examples,), (1.0,))
    per_epoch = math.ceil(mixture.per_epoch / (micro_batch * accumulation * world_size))
    # rounded first: 100 * 0.07 is 7.000000000000001 in binary, which is 7 steps and not 8
    num_steps = max_steps if max_steps is not None else max(1, math.ceil(round(per_epoch * epochs, 9)))
    return Plan(micro_batch, accumulation, world_size, mixture.per_epoch, num_steps, mixture, flat, rehearsal)


def step_indices(plan: Plan, seed: int) -> Iterator[list[int]]:
    """Yield the example indices of each optimizer step: every epoch a fresh order, drawn from (seed, epoch).

    Behind the task's come those of the rehearsal, by indices of their own.
    """
    mixture = plan.mixture or Mixture((plan.num_examples,), (1.0,))
    rehearsed = plan.rehearsal.order(seed) if plan.rehearsal else iter(())
    step = 0
    epoch = 0
    while step < plan.num_steps:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)  # a prime keeps seeds' epochs apart
        order = mixture.epoch(generator)
        for start in range(0, plan.num_examples, plan.per_step):
            if step == plan.num_steps:
                return
            chosen = order[start : start + plan.per_step].tolist()
            beside = plan.rehearsal.beside(len(chosen)) if plan.rehearsal else 0
            yield [*chosen, *islice(rehearsed, beside)]
            step += 1
        epoch += 1


def rank_micro_batches(
    examples: Sequence[Example],
    indices: Sequence[int],
    plan: Plan,
    rank: int,
    pad_token_id: int,
    lengths: Sequence[int] | None = None,
) -> list[Batch]:
    """One rank's micro-batches of one step: exactly `accumulation` of the task, then `rehearsal_micro_batches`.

    The step's examples are dealt out by length: those of a micro-batch are alike, so that little is padding, and so
    are the micro-batches that the ranks run at the same time. The loss is the step's, so its gradient is the same
    however they are dealt. A micro-batch without an example still has one row, without labels: every rank runs the
    same number of forwards (ZeRO-3 hangs otherwise) and contributes nothing with it. `indices` in a batch names the
    example of each row (where the plan is flat: of each pack in the row), int64.

    Args:
        lengths: tokens of each example, so that a rank reads no example but its own; None: all of the step's are read.
    """
    batches = []
    length_of = lengths.__getitem__ if lengths is not None else lambda index: len(examples[index].input_ids)
    for chosen, count in _kinds(indices, plan):
        by_length = sorted(chosen, key=length_of, reverse=True)
        bounds = _bounds(len(by_length), count * plan.world_size)
        for number in range(count):
            # every other time the ranks take turns the other way round, or the first would always have the longest
            slot = number * plan.world_size + (rank if number % 2 == 0 else plan.world_size - 1 - rank)
            part = by_length[bounds[slot] : bounds[slot + 1]]
            rows = [examples[index] for index in part] or [_silent(examples[by_length[-1]])]
            names = torch.tensor(part or by_length[-1:])
            batches.append(collate([join(rows)] if plan.flat else rows, pad_token_id) | {"indices": names})
    return batches


def count_positions(plan: Plan, lengths: Sequence[int], seed: int) -> int:
    """Positions of all batches of a training, padding included, over all ranks.

    Args:
        lengths: tokens of each example.
    """
    count = 0
    for indices in step_indices(plan, seed):
        for chosen, micro_batches in _kinds(indices, plan):
            ordered = sorted((lengths[i] for i in chosen), reverse=True)
            bounds = _bounds(len(ordered), micro_batches * plan.world_size)
            for begin, end in pairwise(bounds):
                part = ordered[begin:end] or ordered[-1:]
                count += sum(part) if plan.flat else part[0] * len(part)
    return count


def _kinds(indices: Sequence[int], plan: Plan) -> list[tuple[Sequence[int], int]]:
    """A step's examples of the task and those of the rehearsal, each with its number of micro-batches on a rank."""
    if plan.rehearsal is None:
        return [(indices, plan.accumulation)]
    first = plan.rehearsal.first
    task, rehearsed = [i for i in indices if i < first], [i for i in indices if i >= first]
    return [(task, plan.accumulation), (rehearsed, plan.rehearsal_micro_batches)]


def _bounds(count: int, slots: int) -> list[int]:
    """Where a step's examples, ordered by length, are cut into `slots` micro-batches, those of all ranks."""
    each, more = divmod(count, slots)
    return [slot * each + min(slot, more) for slot in range(slots + 1)]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad on the right.

    Returns:
        input_ids, attention_mask and labels, each int64 [B, T]; padding has label -100. Of packs also position_ids
        [B, T], which begin at 0 for each conversation: by them attention keeps to its own, and a padding token is a
        conversation of its own; and `cu_seq_lens` int32 [n + 1], where the conversations begin in the rows laid behind
        one another, a row's padding as one. Of the base's answers with stored probabilities also `top_k_indices` and
        `top_k_log_probs` [N, k] and `top_k_rest` [N], for the N tokens that carry the loss, row by row.
    """
    longest = max(len(e.input_ids) for e in examples)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)

    batch = {
        "input_ids": padded([e.input_ids for e in examples], pad_token_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
    }
    if examples[0].parts:
        batch["position_ids"] = padded([[i for n in e.parts for i in range(n)] for e in examples], 0)
        batch["cu_seq_lens"] = _conversation_bounds(examples, longest)
    if stored := [e.top_k for e in examples if e.top_k is not None]:
        chained = TopK.chain(stored)
        batch |= {"top_k_indices": chained.indices, "top_k_log_probs": chained.log_probs, "top_k_rest": chained.rest}
    return batch


def _conversation_bounds(examples: Sequence[Example], width: int) -> Tensor:
    lengths = [n for e in examples for n in (*e.parts, width - len(e.input_ids)) if n]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def count_supervised(batch: Batch) -> int:
    """Tokens of a batch that carry the loss (the first position is never predicted)."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _silent(example: Example) -> Example:
    return replace(example, labels=[IGNORED] * len(example.input_ids), top_k=None)
