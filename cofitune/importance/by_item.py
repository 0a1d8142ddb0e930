"""An item may be several examples (one a response, where the template rewrites earlier turns): it counts once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ITEMS = "items"  # of a micro-batch: the item of each row, int64 [B], from 0 on without gaps; none: each row is one


def item_batches(begins_item: Sequence[bool], batch_size: int) -> list[range]:
    """Divide examples, in order, among micro-batches of whole items.

    Args:
        begins_item: whether each example is the first one of its item [N].
        batch_size: examples that a micro-batch has at most, unless one item alone has more.

    Returns:
        The places of each micro-batch's examples.
    """
    starts = [place for place, begins in enumerate(begins_item) if begins]
    cuts = starts[:1]
    for start, end in zip(starts, [*starts[1:], len(begins_item)], strict=True):
        if end - cuts[-1] > batch_size and start > cuts[-1]:
            cuts.append(start)
    return [range(*bounds) for bounds in zip(cuts, [*cuts[1:], len(begins_item)], strict=True)]


def items_of_rows(begins_item: Sequence[bool]) -> Tensor:
    """The item of each row of a micro-batch, int64 [B]."""
    return torch.tensor([int(begins) for begins in begins_item]).cumsum(0) - 1


def count_items(batch: Mapping[str, Tensor]) -> int:
    """Items of a micro-batch."""
    return int(batch[ITEMS].max()) + 1 if ITEMS in batch else len(batch["input_ids"])


def sum_by_item(gradient: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Add up the gradients of each item's examples, [L, B, units] → [L, items, units].

    An item's loss is summed over its responses, and so is its gradient: what one example of all of them would give.
    """
    if ITEMS not in batch or count_items(batch) == gradient.shape[1]:
        return gradient
    sums = gradient.new_zeros(gradient.shape[0], count_items(batch), gradient.shape[2])
    return sums.index_add_(1, batch[ITEMS].to(gradient.device), gradient)
