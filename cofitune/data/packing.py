"""Packing: several examples in one row, each of them attending to itself alone, so that hardly a token is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cofitune.data.chat import IGNORED, Example, LazyExamples
from cofitune.data.top_k import TopK


def pack_lengths(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Divide items among packs of at most `capacity` tokens by best fit decreasing.

    The longest item goes first, and each into the fullest pack that has room for it; needs at most 11/9 of the fewest
    packs possible, and one (D. S. Johnson, Near-optimal bin packing algorithms, 1973). The same lengths give the same
    packs.

    Args:
        lengths: tokens of each item, int [N], none above `capacity`.

    Returns:
        Each pack's items as indices, ascending.
    """
    pack_of = np.empty(len(lengths), dtype=np.int64)
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the tokens they have room for
    spaces: list[int] = []  # those of `with_space` that are not empty, ascending
    num_packs = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            pack, space = num_packs, capacity
            num_packs += 1
        else:
            space = spaces[at]
            pack = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(at)
        pack_of[item] = pack
        left = space - length
        if left:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(pack)
    order = np.argsort(pack_of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(pack_of[order])) + 1)


class WithLengths(Protocol):
    """Examples whose lengths are known without reading them: int [N]."""

    lengths: np.ndarray

    def __getitem__(self, index: int, /) -> Example: ...


class Packs(LazyExamples):
    """Packs of examples, each read as one example with its parts' lengths.

    Attributes:
        lengths: tokens of each pack, [number of packs].
    """

    def __init__(self, examples: WithLengths, packs: list[np.ndarray]) -> None:
        self._examples = examples
        self._packs = packs
        self.lengths = np.array([int(examples.lengths[items].sum()) for items in packs])

    def __len__(self) -> int:
        return len(self._packs)

    def example(self, index: int) -> Example:
        """One of them."""
        return join([self._examples[int(item)] for item in self._packs[index]])


def join(examples: Sequence[Example]) -> Example:
    """Lay examples one behind another. The first token of each carries no loss: what precedes it is another's."""
    return Example(
        [token for e in examples for token in e.input_ids],
        [label for e in examples for label in _without_first(e)],
        tuple(length for e in examples for length in (e.parts or (len(e.input_ids),))),
        TopK.chain(stored) if (stored := [e.top_k for e in examples if e.top_k is not None]) else None,
    )


def _without_first(example: Example) -> list[int]:
    return [IGNORED, *example.labels[1:]]
