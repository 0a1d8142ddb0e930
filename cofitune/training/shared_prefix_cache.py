"""One frozen prefix for many trials: what enters the lower layers is kept for all trainings that begin there or higher.

The trials of a search see the same batches, and below its lowest trained layer each of them is the base. What enters
that layer is kept under the batch's contents; a trial that begins there, or higher, goes on from it, and runs only the
layers between. The same batch gives the same bits, so that no trial's loss depends on what was kept.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cofitune.data.batches import Batch
from cofitune.training.layer_input import LayerInput, Outputs

Key = tuple[int, bytes]  # a layer, and a batch's contents


class Store(Protocol):
    """Where one rank keeps its hidden states."""

    def put(self, key: Key, hidden: Tensor) -> None:
        """Keep them, [B, T, H]."""

    def get(self, key: Key) -> Tensor:
        """What was kept, on the CPU."""

    def __contains__(self, key: Key) -> bool: ...


class MemoryStore:
    """In this process' memory."""

    def __init__(self) -> None:
        self._kept: dict[Key, Tensor] = {}

    def put(self, key: Key, hidden: Tensor) -> None:
        self._kept[key] = hidden.to("cpu", copy=True)

    def get(self, key: Key) -> Tensor:
        return self._kept[key]

    def __contains__(self, key: Key) -> bool:
        return key in self._kept


class DiskStore:
    """In a file without a name, which vanishes with this process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- as long as this lives
        self._kept: dict[Key, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def put(self, key: Key, hidden: Tensor) -> None:
        """Raises an OSError where the disk is full."""
        data = hidden.cpu().contiguous().view(torch.uint8).numpy().data
        self._file.seek(self._end)
        self._file.write(data)
        self._file.flush()
        self._kept[key] = (self._end, hidden.shape, hidden.dtype)
        self._end += data.nbytes

    def get(self, key: Key) -> Tensor:
        begin, shape, dtype = self._kept[key]
        hidden = torch.empty(shape, dtype=dtype)
        view = hidden.view(-1).view(torch.uint8).numpy().data
        while view:
            view = view[os.preadv(self._file.fileno(), [view], begin) :]
            begin = self._kept[key][0] + hidden.nbytes - view.nbytes
        return hidden

    def __contains__(self, key: Key) -> bool:
        return key in self._kept


class SharedPrefix:
    """What is kept of one base's prefix, from one training to the next."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.kept_layers: list[int] = []

    def of_training(self, model: nn.Module, layers: str, first: int, keep: bool) -> TrainingPrefix:
        """The prefix of one training. Every rank must make the same.

        Args:
            layers: path of the model's list of decoder layers.
            first: its lowest trained layer.
            keep: whether there is room for what enters that layer; without, only what is there is used.
        """
        if keep and first not in self.kept_layers:
            self.kept_layers = sorted([*self.kept_layers, first])
        usable = [layer for layer in reversed(self.kept_layers) if layer <= first]
        return TrainingPrefix(model, layers, self._store, usable, first if keep else None)


class TrainingPrefix:
    """A `Prefix` for one training: it begins at the highest layer that is kept, and keeps what it lacks."""

    def __init__(self, model: nn.Module, layers: str, store: Store, usable: Sequence[int], keeps: int | None) -> None:
        self._store, self._keeps = store, keeps
        outputs: Outputs = {}
        self._inputs = {layer: LayerInput(model, layers, layer, outputs) for layer in usable}  # the highest first
        self.highest = next(iter(self._inputs.values()), None)

    def count_missing(self, batch: Batch) -> list[int]:
        """For each usable layer, 1 where the batch is not kept."""
        contents = _contents(batch)
        return [int((layer, contents) not in self._store) for layer in self._inputs]

    @contextmanager
    def around(self, batch: Batch, missing: Sequence[int]) -> Iterator[None]:
        """Begin at the highest layer of which no rank lacks its batch; keep what enters the one that is to be kept."""
        contents = _contents(batch)
        lacking = dict(zip(self._inputs, missing, strict=True))
        begin = next((layer for layer, count in lacking.items() if not count), None)
        with ExitStack() as stack:
            if begin is not None:
                hidden = self._store.get((begin, contents)).to(batch["input_ids"].device)
                stack.enter_context(self._inputs[begin].replay(hidden))
            if self._keeps is not None and lacking[self._keeps]:
                key = (self._keeps, contents)
                stack.enter_context(self._inputs[self._keeps].capture(lambda hidden: self._store.put(key, hidden)))
            yield


def _contents(batch: Batch) -> bytes:
    """A batch by what the frozen layers see of it."""
    digest = hashlib.sha256()
    for name in ("input_ids", "attention_mask", "position_ids"):
        if name in batch:
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].cpu().contiguous().numpy().data)
    return digest.digest()
