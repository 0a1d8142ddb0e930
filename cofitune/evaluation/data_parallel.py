"""How ranks share the work: each has the whole model and answers every n-th batch; all know all answers afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from cofitune.distributed import LONGEST_WAIT, device, run_on_rank_zero, waiting_group

T = TypeVar("T")


@dataclass(frozen=True)
class BatchSharding:
    """One rank's share of the batches.

    Batches are made before they are dealt out, so an answer is the same on any number of ranks, to the last bit.

    Attributes:
        rank, world_size: this process among those that answer.
        group: the process group of them all; None: the default one.
        on_progress: told (requests done, requests of the task) after each batch of this rank.
    """

    rank: int = 0
    world_size: int = 1
    group: ProcessGroup | None = None
    on_progress: Callable[[int, int], None] | None = None

    def run(self, batches: Sequence[Sequence[int]], answer: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
        """Answers to all requests, in the requests' order.

        Args:
            batches: indices of the requests of each batch; together all of them, each once.
            answer: answers the requests of one batch, in its order.
        """
        total, done = sum(map(len, batches)), 0
        results: dict[int, T] = {}
        for number, batch in enumerate(batches):
            done += len(batch)
            if number % self.world_size != self.rank:
                continue
            results.update(zip(batch, answer(batch), strict=True))
            if self.on_progress is not None:
                self.on_progress(done, total)
        if self.world_size > 1:
            parts: list[dict[int, T]] = [{}] * self.world_size
            distributed.all_gather_object(parts, results, group=self.group)
            results = {index: value for part in parts for index, value in part.items()}
        return [results[index] for index in range(total)]

    def barrier(self) -> None:
        """Wait until every rank is here. `broadcast` is no barrier: rank 0 goes on before the others have its value."""
        if self.world_size > 1:
            distributed.barrier(group=self.group)

    def run_on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and give its result to every rank.

        Raises:
            UserError: rank 0 met one; every rank raises it.
        """
        return work() if self.world_size == 1 else run_on_rank_zero(work)

    def least(self, own: Mapping[str, int]) -> dict[str, int]:
        """Of each number the smallest of any rank; all ranks have the same names."""
        if self.world_size == 1:
            return dict(own)
        everyone: list[Mapping[str, int]] = [own] * self.world_size
        distributed.all_gather_object(everyone, own, group=self.group)
        return {name: min(numbers[name] for numbers in everyone) for name in own}

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def join(rank: int, world_size: int) -> BatchSharding:
    """Meet the other ranks of the environment; the answers travel through the CPU, however long one rank takes."""
    if torch.cuda.is_available():  # else each rank would also take memory of the first GPU
        torch.cuda.set_device(device())
    if world_size == 1:
        return BatchSharding()
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    return BatchSharding(rank, world_size, waiting_group())


def in_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a sequence into batches of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
