"""Drift: how far a model has moved from its base on the base's own answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from cofitune.data.batches import Plan, rank_micro_batches
from cofitune.data.chat import IGNORED, Example
from cofitune.data.top_k import TopK
from cofitune.training.loss import kl_from_base, supervised_logits
from cofitune.training.prefix_cache import Around, nothing_around

if TYPE_CHECKING:
    from cofitune.zero import Engine


@dataclass(frozen=True)
class DriftRecord:
    """One line of `metrics.jsonl` about the held-out answers.

    Attributes:
        step: optimizer steps that were taken before.
        drift: mean of log p_base − log p_model over the answers' tokens, in nats a token: an estimate of
            KL(base ‖ model), exact in the mean for answers sampled at temperature 1 and optimistic for greedy ones. It
            is 0 for the base. KL to the base is what predicts forgetting (RL's Razor, arXiv 2509.04259). None where it
            is not finite.
        kl: mean KL(base ‖ model) at those tokens, over the stored classes (training/loss.py); None without them.
    """

    step: int
    drift: float | None
    kl: float | None

    def as_dict(self) -> dict[str, object]:
        """The record as JSON takes it."""
        return asdict(self)

    def is_below(self, limit: float) -> bool:
        """Whether both figures are at most `limit` nats a token; one that is not finite is not.

        On greedy answers the drift alone would hold nobody back: training on such answers makes them likelier still,
        and the drift falls below 0 while the KL divergence rises (measured in the demo: −0.15 and 0.30).
        """
        return self.drift is not None and max(self.drift, self.kl or 0.0) <= limit


@dataclass(frozen=True)
class HeldOut:
    """What drift is measured on.

    Attributes:
        examples: the base's answers to held-out prompts.
        base_log_prob: mean of the base's own log-probabilities of their tokens, in nats a token.
        tokens: of all answers.
    """

    examples: Sequence[Example]
    base_log_prob: float
    tokens: int


def measure_drift(
    engine: Engine,
    held_out: HeldOut,
    micro_batch: int,
    pad_token_id: int,
    step: int,
    around: Around = nothing_around,
) -> DriftRecord:
    """One forward pass over the held-out answers, which the ranks share out. Every rank must call, and gets the same.

    Each rank runs equally many forwards (ZeRO-3 hangs otherwise), without gradients and without dropout.

    Args:
        around: what each batch's forward pass runs in.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    count = len(held_out.examples)
    plan = Plan(micro_batch, 1, world_size, count, num_steps=1)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)  # nats, tokens, KL, tokens with stored classes
    engine.eval()
    with torch.no_grad():
        for start in range(0, count, plan.per_step):
            indices = range(start, min(start + plan.per_step, count))
            (batch,) = rank_micro_batches(held_out.examples, indices, plan, rank, pad_token_id)
            batch = {k: v.to(engine.device) for k, v in batch.items()}
            with around(batch):
                logits, targets, _ = supervised_logits(engine, batch)
            sums[0] += cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            sums[1] += (targets != IGNORED).sum()
            if "top_k_rest" in batch:
                stored = TopK(batch["top_k_indices"], batch["top_k_log_probs"], batch["top_k_rest"])
                sums[2] += kl_from_base(logits, stored).sum()
                sums[3] += len(stored)
    engine.train()
    torch.distributed.all_reduce(sums)
    nats, tokens, kl, stored_tokens = sums.tolist()
    drift = held_out.base_log_prob + nats / max(1.0, tokens)
    divergence = kl / stored_tokens if stored_tokens else math.nan
    return DriftRecord(step, _finite(drift), _finite(divergence))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
