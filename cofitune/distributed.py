"""What one rank alone can do or find out, agreed on by all: none waits for one that has met a mistake and gone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from cofitune.errors import UserError, differences
from cofitune.ranks import Rank, this_rank

LONGEST_WAIT = timedelta(hours=12)  # for what one rank does alone: a full 13B checkpoint is 156 GB
T = TypeVar("T")
# the default group, and that of its ranks in which they wait for long
_waiting: list[distributed.ProcessGroup | None] = [None, None]


def waiting_group() -> distributed.ProcessGroup | None:
    """The group in which ranks wait for what one does alone, through the CPU, for up to `LONGEST_WAIT`.

    A step's collectives have a short timeout (`train.ddp_timeout`), so that a rank that is lost is noticed. Collective
    where it is asked for first.
    """
    whole = distributed.group.WORLD
    if _waiting[0] is not whole:
        # with the usual timeout for connecting: where gloo cannot, nobody should wait for hours to hear of it
        group = distributed.new_group(backend="gloo")
        distributed.distributed_c10d._set_pg_timeout(LONGEST_WAIT, group)
        _waiting[:] = [whole, group]
    return _waiting[1]


def wait_for_all() -> None:
    """Wait until every rank is here, for up to `LONGEST_WAIT`. Collective."""
    if distributed.get_world_size() > 1:
        distributed.barrier(group=waiting_group())


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result, which must pickle, to every rank, however long it takes. Collective.

    Raises:
        UserError: rank 0 met one; every rank raises it.
    """
    if distributed.get_world_size() == 1:
        return work()
    rank, group = distributed.get_rank(), waiting_group()
    messages: list[Any] = [None, None]  # the result, or a mistake's words
    mistake: UserError | None = None
    if rank == 0:
        try:
            messages[0] = work()
        except UserError as error:
            mistake, messages[1] = error, str(error)
    distributed.broadcast_object_list(messages, 0, group=group)
    if mistake is not None:
        raise mistake
    if messages[1] is not None:
        raise UserError(messages[1], everywhere=True)
    result: T = messages[0]
    return result


def check_agreement(own: Mapping[str, object], group: distributed.ProcessGroup | None = None) -> None:
    """Compare what the ranks are about to do. Collective, right after they met; nothing to do for one rank.

    Node-local copies of a config, of data, of a model or of packages may differ: then the ranks would train something
    that no config describes, or wait for each other for ever.

    Args:
        own: what this rank has found, as JSON values; sections may be nested.
        group: the ranks' process group; None: the default one.

    Raises:
        UserError: a rank differs from rank 0; the message names it, its host, and the entries. Every rank raises it.
    """
    if not distributed.is_initialized() or distributed.get_world_size(group) == 1:
        return
    mine = (socket.gethostname(), json.loads(json.dumps(own)))
    everyone: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, mine, group=group)
    host, expected = everyone[0]
    problems = []
    for rank, (where, found) in enumerate(everyone):
        changed = differences("", expected, found)
        if changed:
            shown = "; ".join(changed[:8]) + ("; …" if len(changed) > 8 else "")
            problems.append(f"rank {rank} on {where} (here) differs from rank 0 on {host} (there): {shown}")
    if problems:
        raise UserError("the ranks disagree: " + "\n".join(problems), everywhere=distributed.get_rank(group) != 0)


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers. Collective where there are several ranks.

    Args:
        device: where the ranks talk.
    """
    return _all_reduce(value, device, distributed.ReduceOp.MAX)


def all_reduce_min(value: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers. Collective where there are several ranks.

    Args:
        device: where the ranks talk.
    """
    return _all_reduce(value, device, distributed.ReduceOp.MIN)


def _all_reduce(value: int, device: torch.device, how: distributed.ReduceOp.RedOpType) -> int:
    if not distributed.is_initialized():
        return value
    result = torch.tensor(value, device=device)
    distributed.all_reduce(result, how)
    return int(result)


def device() -> torch.device:
    """Where models are scored: on this rank's GPU, where there is one."""
    count = torch.cuda.device_count()
    return torch.device("cuda", this_rank().device(count)) if count else torch.device("cpu")


def device_name() -> str:
    """The kind of device that computes, on whose kernels the last digits depend: a GPU's name, or cpu."""
    return torch.cuda.get_device_name(device()) if torch.cuda.is_available() else "cpu"


def device_of(rank: Rank) -> torch.device:
    """The rank's own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank.device(torch.cuda.device_count()))


def broadcast_from_rank_zero(tensor: Tensor) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    on_gpu = torch.distributed.get_backend() == "nccl"  # which has nothing to do with the host's memory
    sent = tensor.to("cuda" if on_gpu else "cpu").contiguous()
    torch.distributed.broadcast(sent, 0)
    tensor.copy_(sent)


def all_reduce_sum(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value


def rank_or_zero() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size_or_one() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
