"""The validation loss: what the training's loss is on items that it does not train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cofitune.data.batches import Plan, count_supervised, rank_micro_batches
from cofitune.data.chat import Example
from cofitune.training.loss import summed_loss


@dataclass(frozen=True)
class ValidationRecord:
    """One line of `metrics.jsonl` about the validation items.

    Attributes:
        step: optimizer steps that were taken before.
        validation_loss: mean cross-entropy a supervised token, in nats; None where it is not finite.
    """

    step: int
    validation_loss: float | None

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON takes it."""
        return asdict(self)


def validate(
    engine: Any, examples: Sequence[Example], micro_batch: int, pad_token_id: int, step: int
) -> ValidationRecord:
    """The mean loss over all items, which the ranks share out. Every rank must call, and gets the same.

    Each rank runs equally many forwards (ZeRO-3 hangs otherwise), without gradients and without dropout.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plan = Plan(micro_batch, 1, world_size, len(examples), num_steps=1)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss, supervised tokens
    engine.eval()
    with torch.no_grad():
        for start in range(0, len(examples), plan.per_step):
            indices = range(start, min(start + plan.per_step, len(examples)))
            (batch,) = rank_micro_batches(examples, indices, plan, rank, pad_token_id)
            sums[0] += summed_loss(engine, {k: v.to(engine.device) for k, v in batch.items()})
            sums[1] += count_supervised(batch)
    engine.train()
    torch.distributed.all_reduce(sums)
    loss, supervised = sums.tolist()
    mean = loss / max(1.0, supervised)
    return ValidationRecord(step, mean if math.isfinite(mean) else None)
