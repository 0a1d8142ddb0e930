"""What an optimizer step holds, counted over all ranks: the tokens that its losses are divided by, and its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        tokens: real tokens.
        positions: tokens and padding.
        pairs: pairs of tokens of one item.
        missing: what the prefix cache does not keep yet, in its own units; None without one.
    """

    supervised: int
    rehearsed: int
    tokens: int
    positions: int
    pairs: int
    missing: tuple[int, ...] | None

    def figures(self, seconds: float, meter: Meter | None) -> dict[str, Any]:
        """What a StepRecord tells of the step's work and time, by its fields."""
        reused = self.missing is not None and not any(self.missing)  # the frozen prefix was not computed
        learnt = self.supervised + self.rehearsed
        return {
            "supervised_tokens": self.supervised,
            "rehearsal_tokens": self.rehearsed,
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "padded_share": 1 - self.tokens / self.positions,
            "mfu": meter.mfu(self.tokens, self.pairs, learnt, seconds, reused) if meter else None,
        }


def count_over_ranks(batches: Sequence[Batch], of_task: int, prefix: Prefix | None, device: torch.device) -> StepCounts:
    """Add up the counts of all ranks' micro-batches of a step, in one reduction. Every rank must call.

    Args:
        batches: this rank's.
        of_task: how many of them, the first ones, are the task's; the others are the rehearsal's.
        device: where the ranks talk.
    """
    local = [*_count(batches, of_task), *(prefix.count_missing(batches) if prefix else [])]
    supervised, rehearsed, tokens, positions, pairs, *missing = all_reduce_sum(
        torch.tensor(local, device=device)
    ).tolist()
    return StepCounts(supervised, rehearsed, tokens, positions, pairs, tuple(missing) if prefix else None)


def _count(batches: Sequence[Batch], of_task: int) -> list[int]:
    """One rank's supervised and rehearsed tokens, real tokens, positions, and pairs of tokens of one item."""
    masks = [b["attention_mask"] for b in batches]
    # the p-th token of an item, counted from 0, adds 2p + 1 to the square of its length
    places = [b.get("position_ids", torch.arange(b["input_ids"].shape[1])) for b in batches]
    return [
        sum(map(count_supervised, batches[:of_task])),
        sum(map(count_supervised, batches[of_task:])),
        sum(int(mask.sum()) for mask in masks),
        sum(mask.numel() for mask in masks),
        sum(int(((2 * place + 1) * mask).sum()) for place, mask in zip(places, masks, strict=True)),
    ]
