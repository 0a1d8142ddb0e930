"""A model's probabilities at some tokens, as far as they are stored: the likeliest k of each, and the rest as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The distribution over the vocabulary at N tokens, in k + 1 classes.

    Attributes:
        indices: int32 [N, k], the k likeliest entries of the vocabulary, the likeliest first.
        log_probs: float32 [N, k], their log-probabilities in nats.
        rest: float32 [N], log of the probability of all other entries together; -inf where there are none.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor

    def __len__(self) -> int:
        return len(self.rest)

    def first(self, count: int) -> TopK:
        """The first `count` tokens."""
        return TopK(self.indices[:count], self.log_probs[:count], self.rest[:count])

    def to(self, device: torch.device) -> TopK:
        """The same on a device."""
        return TopK(self.indices.to(device), self.log_probs.to(device), self.rest.to(device))

    @classmethod
    def chain(cls, parts: Sequence[TopK]) -> TopK:
        """Several as one, in order."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("indices", "log_probs", "rest")))
