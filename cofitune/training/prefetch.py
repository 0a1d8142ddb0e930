"""The next step's batches, made by a thread while the devices work on this one's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from cofitune.data.batches import Batch

T = TypeVar("T")
R = TypeVar("R")


def one_ahead(work: Iterable[T], make: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each piece of work with what `make` makes of it, in order; that of the next piece is on its way meanwhile.

    What `make` raises is raised where its piece would come. It runs one call at a time, in a thread of its own.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        pending = None
        for piece in work:
            following = (piece, thread.submit(make, piece))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


def pinned(batch: Batch) -> Batch:
    """A batch that a GPU can fetch by itself; without a GPU the batch as it is."""
    return {k: v.pin_memory() for k, v in batch.items()} if torch.cuda.is_available() else batch
