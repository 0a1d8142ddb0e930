"""Examples that begin alike, such as the choices behind one question: a batch in which the beginning is read once.

A row is laid out as `beginning, rest, rest, ..., beginning, rest, ...`. Each part attends to itself and to the keys of
the beginning that it continues (cofitune/model/varlen.py), and its positions go on from there: the model computes at
every token what it computes for the example alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from cofitune.data.batches import Batch
from cofitune.data.chat import IGNORED, Example


@dataclass(frozen=True)
class SharedBeginning:
    """Examples that begin alike.

    Attributes:
        ids: the tokens that are read once. The last token that all have in common is not among them: each rest begins
            with it, because what follows a token is predicted where it stands.
        rests: what is left of each example, labels included.
        names: a number for each example.
    """

    ids: tuple[int, ...]
    rests: tuple[Example, ...]
    names: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], names: Sequence[int]) -> SharedBeginning:
        """Divide examples into what they have in common, as far as none of it is predicted, and the rest."""
        rows = [example.input_ids for example in examples]
        least, most = min(rows), max(rows)
        alike = next((n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(map(len, rows)))
        asked = min(_first_label(example) for example in examples)
        cut = max(0, min(alike, asked) - 1)
        rests = tuple(Example(e.input_ids[cut:], [IGNORED, *e.labels[cut + 1 :]]) for e in examples)
        return cls(tuple(rows[0][:cut]), rests, tuple(names))

    @property
    def num_tokens(self) -> int:
        """Tokens that are read."""
        return len(self.ids) + sum(len(rest.input_ids) for rest in self.rests)

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return sum(rest.num_supervised for rest in self.rests)

    def silent(self) -> SharedBeginning:
        """The same without a label: a rank that has nothing to read runs it beside the others."""
        rests = tuple(Example(rest.input_ids, [IGNORED] * len(rest.input_ids)) for rest in self.rests)
        return SharedBeginning(self.ids, rests, self.names)


def divide(items: Sequence[SharedBeginning], tokens: int, labels: int) -> list[list[SharedBeginning]]:
    """Divide items, in their order, among batches of at most `tokens` tokens and `labels` labels.

    An item that has more has a batch of its own.
    """
    batches: list[list[SharedBeginning]] = []
    tokens_left = labels_left = 0
    for item in items:
        if item.num_tokens > tokens_left or item.num_labels > labels_left:
            batches.append([])
            tokens_left, labels_left = tokens, labels
        batches[-1].append(item)
        tokens_left -= item.num_tokens
        labels_left -= item.num_labels
    return batches


def collate_shared(items: Sequence[SharedBeginning]) -> Batch:
    """Lay items behind one another in one row of N tokens.

    Returns:
        input_ids, attention_mask, labels and position_ids, each int64 [1, N]; `names` int64 [1, N], the example of each
        token (of a beginning its first one's); `cu_seq_lens` int32 [S + 1], where the row's parts begin;
        `key_places` int64 [K], the tokens whose keys the parts attend to, part by part, and `cu_seq_lens_k` int32
        [S + 1], where each part's begin among these.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    names: list[int] = []
    places: list[int] = []
    queries: list[int] = []  # of each part: its tokens
    keys: list[int] = []  # and those that it attends to

    def add(part: Example, name: int, beginning: range) -> None:
        own = range(len(ids), len(ids) + len(part.input_ids))
        ids.extend(part.input_ids)
        labels.extend(part.labels)
        positions.extend(range(len(beginning), len(beginning) + len(own)))
        names.extend([name] * len(own))
        places.extend([*beginning, *own])
        queries.append(len(own))
        keys.append(len(beginning) + len(own))

    for item in items:
        begin = range(len(ids), len(ids) + len(item.ids))
        if item.ids:
            add(Example([*item.ids], [IGNORED] * len(item.ids)), item.names[0], range(0))
        for rest, name in zip(item.rests, item.names, strict=True):
            add(rest, name, begin)
    rows = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "position_ids": positions}
    return {name: torch.tensor([row]) for name, row in {**rows, "names": names}.items()} | {
        "cu_seq_lens": torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        "key_places": torch.tensor(places),
    }


def _first_label(example: Example) -> int:
    return next((n for n, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
