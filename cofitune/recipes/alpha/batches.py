"""How many items a run's base is asked at once while its alpha is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.evaluation.batch_size import device_memory, estimate_asking
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.lengths import fit_lengths, max_positions
from cofitune.model.load import choose_dtype
from cofitune.recipes.from_config import base_anatomy, base_config


@dataclass(frozen=True)
class Batches:
    """Chooses by the memory that the device has, whatever is free there now: points must not depend on that.

    Attributes:
        model: the section `model`.
    """

    model: schema.Model
    tokenizer: PreTrainedTokenizerBase

    def size(self, requested: int | str, tasks: Sequence[LoadedTask]) -> int:
        """`batch_size` of a section; of `auto`, the least that fits of these tasks."""
        if isinstance(requested, int):
            return requested
        config = base_config(self.model)
        fitted = fit_lengths(tasks, self.tokenizer, max_positions(config))
        width = choose_dtype(self.model.dtype).itemsize
        needed = estimate_asking(base_anatomy(self.model, config), fitted, width)
        here = replace(device_memory(), free=None)
        return min(needed.batch(task.task.title, here) for task in fitted)
