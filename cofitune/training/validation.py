"""The validation loss: what the training's loss is on items that it does not train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cofitune.data.batches import Plan, count_supervised, rank_micro_batches
from cofitune.data.chat import Example
from cofitune.training.loss import summed_loss
from cofitune.training.prefix_cache import Around, nothing_around

if TYPE_CHECKING:
    from cofitune.zero import Engine


@dataclass(frozen=True)
class ValidationRecord:
    """One line of `metrics.jsonl` about the validation items.

    Attributes:
        step: optimizer steps that were taken before.
        validation_loss: mean cross-entropy a supervised token, in nats; None where it is not finite.
    """

    step: int
    validation_loss: float | None

    def as_dict(self) -> dict[str, object]:
        """The record as JSON takes it."""
        return asdict(self)


def validate(
    engine: Engine,
    examples: Sequence[Example],
    micro_batch: int,
    pad_token_id: int,
    step: int,
    around: Around = nothing_around,
) -> ValidationRecord:
    """The mean loss over all items, which the ranks share out. Every rank must call, and gets the same.

    Each rank runs equally many forwards (ZeRO-3 hangs otherwise), without gradients and without dropout.

    Args:
        around: what each batch's forward pass runs in.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plan = Plan(micro_batch, 1, world_size, len(examples), num_steps=1)
    engine.eval()
    sums = _sum_losses(engine, engine.device, examples, plan, rank, pad_token_id, around)
    engine.train()
    torch.distributed.all_reduce(sums)
    return ValidationRecord(step, _mean(sums))


def validation_loss(
    model: PreTrainedModel, examples: Sequence[Example], micro_batch: int, pad_token_id: int
) -> float | None:
    """The same loss of a model in memory, in one process without an engine; nats a supervised token, None as above."""
    plan = Plan(micro_batch, 1, 1, len(examples), num_steps=1)
    return _mean(_sum_losses(model.eval(), model.device, examples, plan, 0, pad_token_id))


def _sum_losses(
    model: PreTrainedModel | Engine,
    device: torch.device,
    examples: Sequence[Example],
    plan: Plan,
    rank: int,
    pad_token_id: int,
    around: Around = nothing_around,
) -> Tensor:
    """This rank's loss in nats and its supervised tokens, float64 [2]."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for start in range(0, len(examples), plan.per_step):
            indices = range(start, min(start + plan.per_step, len(examples)))
            (batch,) = rank_micro_batches(examples, indices, plan, rank, pad_token_id)
            on_device = {k: v.to(device) for k, v in batch.items()}
            with around(on_device):
                sums[0] += summed_loss(model, on_device)
            sums[1] += count_supervised(batch)
    return sums


def _mean(sums: Tensor) -> float | None:
    loss, supervised = sums.tolist()
    mean = loss / max(1.0, supervised)
    return mean if math.isfinite(mean) else None
