"""What an estimation adds up on each rank, and what all ranks' sums come to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from cofitune.errors import UserError

HALVES = 2  # even and odd micro-batches


@dataclass(frozen=True)
class Scores:
    """What the data says, in fp64 on the CPU.

    Attributes:
        halves: unit kind → [2, L, units], of the even and of the odd micro-batches, divided by all tokens or samples.
        values: unit kind → [L, units], of all the data.
        tokens, samples: how many real ones there were.
        micro_batches: over all ranks.
    """

    halves: dict[str, Tensor]
    values: dict[str, Tensor]
    tokens: int
    samples: int
    micro_batches: int


@dataclass
class Sums:
    """What one rank has added up so far; an interrupted estimation continues from here.

    Attributes:
        values: unit kind → [2, L, units], fp64, of even and odd micro-batches: the order of additions, which differs
            between numbers of ranks, stays below fp32's rounding.
        tokens, samples, micro_batches: how many are in the sums.
    """

    values: dict[str, Tensor]
    tokens: int = 0
    samples: int = 0
    micro_batches: int = 0


def over_ranks(sums: Sums, device: torch.device, per_token: bool) -> Scores:
    """Add up the ranks' sums and divide once, by all tokens or samples. Checks come after, so that ranks fail together.

    Args:
        device: where the ranks talk.
    """
    values = {kind: value.to(device) for kind, value in sums.values.items()}
    counts = torch.tensor([sums.tokens, sums.samples, sums.micro_batches], dtype=torch.int64, device=device)
    if distributed.is_available() and distributed.is_initialized():
        for value in (*values.values(), counts):
            distributed.all_reduce(value)
    tokens, samples, micro_batches = counts.tolist()
    if tokens == 0:
        raise UserError("importance: the data holds not one token")
    for kind, value in values.items():
        if not torch.isfinite(value).all():
            layer = int((~torch.isfinite(value)).any(dim=-1).any(dim=0).nonzero()[0])
            raise UserError(
                f"importance: the scores of '{kind}' in layer {layer} overflowed (NaN or infinity); try model.dtype: "
                "float32, and check that the model's weights are sound"
            )
    divisor = tokens if per_token else samples
    halves = {kind: (value / divisor).cpu() for kind, value in values.items()}
    whole = {kind: half.sum(dim=0) for kind, half in halves.items()}
    return Scores(halves, whole, tokens, samples, micro_batches)
