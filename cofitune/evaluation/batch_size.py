"""How many items a model is asked at once: as many as a device's memory holds beside the weights, a power of two.

The estimate follows how answers are made: keys and values of prompts and answers (twice, for a cache that grows or
loses rows is copied), what one layer makes of the prompts, an attention mask, and logits where answers are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from cofitune.distributed import device_of
from cofitune.evaluation.items import LoadedTask
from cofitune.host_memory import free_memory, usable_memory
from cofitune.model.anatomy import Anatomy
from cofitune.nvml import free_gpu_memory
from cofitune.ranks import this_rank

MOST_ON_GPU, MOST_ON_HOST = 64, 16  # items; a CPU gains nothing from more
ROOM = 0.5  # of a device's memory beside the weights, for a batch
FREE = 0.9  # of what is free there now, for weights and batch
RANKS_A_HOST = 4  # among which a host's memory is divided, so that batches do not depend on how many there are
FP32 = 4  # bytes of a log-probability
COPIES = 2  # of keys and values at the fullest moment


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a rank's device: a GPU's, or its part of the host's.

    Attributes:
        free: what nobody else uses now; None: not asked.
    """

    total: int
    free: int | None
    on_gpu: bool

    @property
    def most_items(self) -> int:
        """Items a batch at most."""
        return MOST_ON_GPU if self.on_gpu else MOST_ON_HOST


@dataclass(frozen=True)
class AskingMemory:
    """What a model's answers take of a device: bytes of its weights, and of one item of each task by its title."""

    weights: int
    items: Mapping[str, int]

    def batch(self, title: str, device: DeviceMemory) -> int:
        """Items of a task that fit at once: a power of two, 1 at least."""
        room = ROOM * (device.total - self.weights)
        if device.free is not None:
            room = min(room, FREE * device.free - self.weights)
        return power_below(min(device.most_items, int(room // self.items[title])))

    def bytes_with(self, sizes: Mapping[str, int]) -> int:
        """Weights and the largest batch, under these sizes of batches."""
        return self.weights + max(self.items[title] * size for title, size in sizes.items())


def device_memory() -> DeviceMemory:
    """This rank's device as it is now; what this process holds itself on a GPU counts as free.

    A process that only plans for its ranks asks the driver: CUDA's own answer needs a context there, of some 500 MB.
    """
    if torch.cuda.is_available():
        device = device_of(this_rank())
        whole, own = torch.cuda.get_device_properties(device), torch.cuda.memory_reserved(device)
        free = torch.cuda.mem_get_info(device)[0] if own else free_gpu_memory(str(whole.uuid))
        return DeviceMemory(whole.total_memory, None if free is None else free + own, True)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torch's launcher sets it
    return DeviceMemory(usable_memory() // RANKS_A_HOST, free_memory() // here, False)


def estimate_asking(anatomy: Anatomy, tasks: Iterable[LoadedTask], width: int) -> AskingMemory:
    """Estimate from counts alone what asking takes.

    Args:
        tasks: their lengths known (`cofitune.evaluation.lengths.fit_lengths`).
        width: bytes of a number in the precision that answers are made in.
    """
    items = {t.task.title: item_bytes(anatomy, t.longest_whole, t.logits_at_once, width) for t in tasks}
    return AskingMemory(anatomy.num_parameters * width, items)


def item_bytes(anatomy: Anatomy, whole: int, read: int, width: int) -> int:
    """Bytes that an item of a batch takes while it is asked.

    Args:
        whole: tokens of the prompt with its answer.
        read: tokens whose logits are there at once.
    """
    neurons, hidden = anatomy.intermediate_size or 4 * anatomy.hidden_size, anatomy.hidden_size
    keys = anatomy.num_key_value_heads * anatomy.head_dim or hidden
    cache = COPIES * 2 * anatomy.num_layers * keys * whole * width
    layer = whole * (3 * neurons + 6 * hidden) * width
    heads = 1 if anatomy.fuses_attention else anatomy.num_heads
    scores = heads * whole * whole * (width if anatomy.fuses_attention else width + FP32)
    logits = read * anatomy.vocab_size * (width + 2 * FP32)
    return cache + max(layer + scores, logits)


def power_below(count: int) -> int:
    """The largest power of two that is not above a count; 1 at least."""
    return 1 << (max(1, count).bit_length() - 1)


def powers_down_from(size: int) -> list[int]:
    """A power of two and those below it, down to 1."""
    return [1 << exponent for exponent in range(size.bit_length() - 1, -1, -1)]
