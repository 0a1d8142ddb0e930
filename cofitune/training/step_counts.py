"""What an optimizer step holds, counted over all ranks: the tokens that its losses are divided by, and its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from cofitune.data.batches import Batch, count_supervised
from cofitune.distributed import all_reduce_sum
from cofitune.training.prefix_cache import Prefix
from cofitune.training.throughput import Meter


@dataclass(frozen=True)
class StepCounts:
    """A step's counts, over all ranks.

    Attributes:
        supervised: tokens that carry the task's loss.
        rehearsed: tokens that carry the rehearsal's.
        positions: tokens and padding.
        tokens: real tokens of each micro-batch.
        pairs: pairs of tokens of one item, of each micro-batch.
        missing: of each micro-batch, what the prefix cache does not keep yet, in its own units; nothing without one.
    """

    supervised: int
    rehearsed: int
    positions: int
    tokens: tuple[int, ...]
    pairs: tuple[int, ...]
    missing: tuple[tuple[int, ...], ...]

    def figures(self, seconds: float, meter: Meter | None) -> dict[str, Any]:
        """What a StepRecord tells of the step's work and time, by its fields."""
        tokens = sum(self.tokens)
        return {
            "supervised_tokens": self.supervised,
            "rehearsal_tokens": self.rehearsed,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "padded_share": 1 - tokens / self.positions,
            "mfu": meter.mfu(self._flops(meter), seconds) if meter else None,
        }

    def _flops(self, meter: Meter) -> int:
        """What the step needed: of a micro-batch that was kept, the frozen prefix was not computed."""
        total = meter.cost.flops(0, 0, self.supervised + self.rehearsed)
        for tokens, pairs, missing in zip(self.tokens, self.pairs, self.missing, strict=True):
            kept = bool(missing) and not any(missing)
            total += (meter.cached_cost if kept else meter.cost).flops(tokens, pairs, 0)
        return total


def count_over_ranks(batches: Sequence[Batch], of_task: int, prefix: Prefix | None, device: torch.device) -> StepCounts:
    """Add up the counts of all ranks' micro-batches of a step, in one reduction. Every rank must call.

    Args:
        batches: this rank's.
        of_task: how many of them, the first ones, are the task's; the others are the rehearsal's.
        device: where the ranks talk.
    """
    whole = [
        sum(map(count_supervised, batches[:of_task])),
        sum(map(count_supervised, batches[of_task:])),
        sum(batch["attention_mask"].numel() for batch in batches),
    ]
    each = [[*_count(batch), *(prefix.count_missing(batch) if prefix else [])] for batch in batches]
    local = torch.tensor([*whole, *chain.from_iterable(each)], device=device)
    supervised, rehearsed, positions, *flat = all_reduce_sum(local).tolist()
    rows = [tuple(flat[start : start + len(each[0])]) for start in range(0, len(flat), len(each[0]))]
    return StepCounts(
        supervised,
        rehearsed,
        positions,
        tokens=tuple(row[0] for row in rows),
        pairs=tuple(row[1] for row in rows),
        missing=tuple(row[2:] for row in rows),
    )


def _count(batch: Batch) -> list[int]:
    """A micro-batch's real tokens, and its pairs of tokens of one item."""
    mask = batch["attention_mask"]
    # the p-th token of an item, counted from 0, adds 2p + 1 to the square of its length
    place = batch.get("position_ids", torch.arange(mask.shape[1]))
    return [int(mask.sum()), int(((2 * place + 1) * mask).sum())]
