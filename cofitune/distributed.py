"""What one rank alone can do or find out, agreed on by all: none waits for one that has met a mistake and gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from cofitune.errors import UserError

T = TypeVar("T")


def on_rank_0(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result, which must pickle, to every rank. Collective.

    Raises:
        UserError: rank 0 met one; every rank raises it.
    """
    rank = distributed.get_rank()
    told: list[Any] = [None, None]  # the result, or a mistake's words
    mistake: UserError | None = None
    if rank == 0:
        try:
            told[0] = work()
        except UserError as error:
            mistake, told[1] = error, str(error)
    distributed.broadcast_object_list(told, 0)
    if mistake is not None:
        raise mistake
    if told[1] is not None:
        raise UserError(told[1], everywhere=True)
    result: T = told[0]
    return result


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers. Collective where there are several ranks.

    Args:
        device: where the ranks talk.
    """
    if not distributed.is_initialized():
        return value
    found = torch.tensor(value, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)
