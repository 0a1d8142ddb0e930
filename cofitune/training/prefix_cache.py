"""The frozen prefix's activations, kept: what enters the lowest trained layer never changes, so it is computed once.

Below the lowest trained layer nothing moves, and its forward pass gives the same hidden states in every epoch. They are
written down the first time an item is seen, and from then on the forward pass starts at the lowest trained layer: the
embedding and the layers below are neither run nor, under ZeRO-3, gathered.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cofitune.data.batches import Batch
from cofitune.distributed import run_on_rank_zero
from cofitune.errors import UserError
from cofitune.files import gib
from cofitune.host_memory import free_memory
from cofitune.temporary import open_held, remove_leftovers
from cofitune.training.layer_input import LayerInput

SHARED_MEMORY = Path("/dev/shm")
RANDOM = ("drop", "jitter")  # in the names of settings by which a layer answers otherwise every time
READS_BELOW = {  # setting → what layers above the prefix read beside its hidden states
    "num_kv_shared_layers": "keys and values of lower ones",
    "hidden_size_per_layer_input": "the embedding",
}


@dataclass(frozen=True)
class PrefixPlan:
    """What will be kept, known before any weight is read.

    Attributes:
        layers: path of the model's list of decoder layers.
        first: the lowest trained layer.
        lengths: tokens of each item, by its index.
        hidden_size, dtype: of the hidden states [T, H] that enter that layer.
        folder: where the one file lies that all ranks of the machine share.
    """

    layers: str
    first: int
    lengths: Sequence[int]
    hidden_size: int
    dtype: torch.dtype
    folder: Path

    @property
    def row_bytes(self) -> int:
        """Bytes of the hidden states of all items."""
        return sum(self.lengths) * self.hidden_size * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the file: the hidden states, and one byte an item that says whether its own are there."""
        return self.row_bytes + len(self.lengths)

    @property
    def free_bytes(self) -> int:
        """Bytes that are free where the file will lie (its folder may not be there yet)."""
        folder = next(f for f in (self.folder, *self.folder.absolute().parents) if f.is_dir())
        free = shutil.disk_usage(folder).free
        return min(free, free_memory()) if self.folder == SHARED_MEMORY else free

    def check_space(self) -> None:
        """Refuse what does not fit.

        Raises:
            UserError: there is less room than the file needs.
        """
        if self.num_bytes > self.free_bytes:
            raise UserError(
                f"train.prefix_cache needs {gib(self.num_bytes)} in {self.folder}, where "
                f"{gib(self.free_bytes)} are free; set it to "
                + ("disk or none" if self.folder == SHARED_MEMORY else "none, or choose another output_dir")
            )


def changing_prefix(config: PretrainedConfig) -> str | None:
    """Why a model's prefix would not give the same hidden states again, or its upper layers need more than those.

    Args:
        config: the model's; of one with images, its text model's is looked at.
    """
    described = config.get_text_config().to_dict()
    for key, value in _settings(described):
        if any(word in key for word in RANDOM) and "classifier" not in key and value > 0:
            return f"the model's config sets {key}: {value}, which changes the frozen layers' activations every time"
    for key, what in READS_BELOW.items():
        if described.get(key):
            return f"the model's upper layers read {what} ({key})"
    return None


def _settings(config: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield all numbers of a config, those of its sections too."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value)
        elif isinstance(value, int | float):
            yield key, value


class Prefix(Protocol):
    """Keeps what enters a layer of the frozen prefix, and gives it back in place of all that lies below.

    Attributes:
        highest: what enters the highest layer that a forward pass may begin at; None: it begins at none.
    """

    highest: LayerInput | None

    def count_missing(self, batch: Batch) -> list[int]:
        """How much of a micro-batch is not kept yet on this rank, in as many numbers as on every other rank."""

    def around(self, batch: Batch, missing: Sequence[int]) -> AbstractContextManager[None]:
        """What the batch's forward pass runs in.

        Args:
            missing: of the micro-batches that all ranks run at this time, summed.
        """


Around = Callable[[Batch], AbstractContextManager[None]]  # what a batch's forward pass runs in


def nothing_around(_: Batch) -> AbstractContextManager[None]:
    """The whole forward pass runs."""
    return nullcontext()


def around_shared(prefix: Prefix, device: torch.device) -> Around:
    """What a forward pass outside of the training's steps runs in. Every rank enters it, with its own batch."""

    def around(batch: Batch) -> AbstractContextManager[None]:
        missing = torch.tensor(prefix.count_missing(batch), dtype=torch.int64, device=device)
        torch.distributed.all_reduce(missing)
        return prefix.around(batch, missing.tolist())

    return around


class PrefixCache:
    """The kept hidden states of one training. One collective call makes it; the file vanishes with the processes."""

    def __init__(self, model: nn.Module, plan: PrefixPlan) -> None:
        """Make room for all items and map it into every rank.

        Raises:
            UserError: the ranks are on several machines, or the room is not to be had.
        """
        self.highest: LayerInput | None = LayerInput(model, plan.layers, plan.first)
        self._input = self.highest
        self._plan = plan
        self._starts = [0, *accumulate(plan.lengths)]
        whole = _shared_bytes(plan)
        self._rows = whole[: plan.row_bytes].view(plan.dtype).view(-1, plan.hidden_size)  # [tokens of all items, H]
        self._kept = whole[plan.row_bytes :]

    def count_missing(self, batch: Batch) -> list[int]:
        """How many items of the batch are not kept yet (on this rank: what others keep, it may read)."""
        return [int((self._kept[batch["indices"].tolist()] == 0).sum())]

    def around(self, batch: Batch, missing: Sequence[int]) -> AbstractContextManager[None]:
        """Read the batch, or keep what it lacks where a rank lacks some of its own: all run the same layers."""
        return self.writing(batch) if any(missing) else self.reading(batch)

    @contextmanager
    def writing(self, batch: Batch) -> Iterator[None]:
        """Inside, one whole forward pass of the batch is run, and of its items those are kept that were not yet."""

        def keep(hidden: Tensor) -> None:
            if hidden.dtype != self._plan.dtype:
                raise RuntimeError(
                    f"hidden states are {hidden.dtype}, the prefix cache was made for {self._plan.dtype}"
                )
            for index, (row, begin, kept) in zip(batch["indices"].tolist(), self._places(batch), strict=True):
                if not self._kept[index]:
                    kept.copy_(hidden[row, begin : begin + len(kept)])
                    self._kept[index] = 1

        with self._input.capture(keep):
            yield

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Inside, the forward pass of the batch begins at the lowest trained layer with what was kept."""
        rows, longest = batch["input_ids"].shape
        hidden = torch.zeros(rows, longest, self._plan.hidden_size, dtype=self._plan.dtype)
        for row, begin, kept in self._places(batch):
            hidden[row, begin : begin + len(kept)] = kept
        with self._input.replay(hidden.to(batch["input_ids"].device)):
            yield

    def _places(self, batch: Batch) -> Iterator[tuple[int, int, Tensor]]:
        """Yield row, first column and kept hidden states [T, H] of each item: a row each, or in one row all of them."""
        indices = batch["indices"].tolist()
        column = 0
        for number, index in enumerate(indices):
            kept = self._rows[self._starts[index] : self._starts[index + 1]]
            if len(batch["input_ids"]) == len(indices):
                yield number, 0, kept
            else:
                yield 0, column, kept
                column += len(kept)


def _shared_bytes(plan: PrefixPlan) -> Tensor:
    """One file that all ranks map. Its name is taken away at once: however the run ends, nothing is left behind.

    The room is reserved, not only asked for: writing through a mapping to a full disk would kill the process.
    """
    hosts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    if len(set(hosts)) > 1:
        raise UserError(
            f"train.prefix_cache: the ranks are on {len(set(hosts))} machines, which share no memory; set it to none"
        )
    with ExitStack() as held:
        name = run_on_rank_zero(lambda: _reserve(plan, held))
        whole = torch.from_file(name, shared=True, size=plan.num_bytes, dtype=torch.uint8)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            Path(name).unlink()
    return whole


def _reserve(plan: PrefixPlan, held: ExitStack) -> str:
    """Make the file, and return its name; it is held until the others have it, for a killed one's would be removed."""
    remove_leftovers(plan.folder, below=False)
    try:
        path, file = open_held(plan.folder / "prefix")
        held.enter_context(file)
        try:
            os.posix_fallocate(file.fileno(), 0, plan.num_bytes)
        except OSError:
            path.unlink()
            raise
    except OSError as error:
        raise UserError(f"train.prefix_cache: no room for {gib(plan.num_bytes)} in {plan.folder}: {error}") from error
    return str(path)
