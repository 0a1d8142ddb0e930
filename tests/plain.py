"""The loss of a step as the obvious loop has it: an item at a time, without batch or padding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cofitune.data.chat import IGNORED, Example


def mean_loss(model: Any, items: Iterable[Example]) -> Tensor:
    """The cross-entropy of these items, summed, by the number of their tokens that carry it; a scalar in nats."""
    total, count = torch.zeros(()), 0
    for item in items:
        logits, targets = model(torch.tensor([item.input_ids])).logits[0, :-1], torch.tensor(item.labels[1:])
        total = total + cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        count += int((targets != IGNORED).sum())
    return total / count
