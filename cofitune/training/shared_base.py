"""The base's weights held in memory, and models around them: loaded once, and the same to the bit for every trial.

One engine after another on the same model object is not sound under ZeRO-3: DeepSpeed 0.19 leaves in each module the
backward functions of its first engine (`pre_bwd_fn`), the second engine's backward pass then works on the first one's
state, and with activation checkpointing it fails. A model object costs next to nothing, its weights do: so every
training gets an object of its own, whose parameters share the held tensors. DeepSpeed copies what it trains or shards
into buffers of its own and writes into no tensor that it was given, under every stage: tests/training/test_held.py
probes that, bit for bit against a fresh model, and `changed` proves it after each trial.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class SharedBase:
    """A model whose weights nobody writes into. Memory-mapped weights stay in the system's page cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: on the CPU, and from now on not to be used otherwise."""
        self._model = model
        self._checksums = self._sum_up()

    def instantiate(self, overrides: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
        """A model object of its own with these weights, which are shared and not copied.

        Args:
            overrides: parameter name → tensor of the same shape that takes the place of the held one.
        """
        overrides = overrides or {}
        own = {
            id(parameter): nn.Parameter(overrides.get(name, parameter.data))
            for name, parameter in self._model.named_parameters()  # tied weights once
        }
        model: PreTrainedModel = copy.deepcopy(self._model, own)  # deepcopy takes for copied what it finds there
        return model

    def changed(self) -> list[str]:
        """The tensors that are not what they were when the model was handed over."""
        return [name for name, value in self._sum_up().items() if value != self._checksums[name]]

    def _sum_up(self) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in self._model.state_dict().items()}


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, taken as words as wide as its place allows: memory is read once, at full speed.

    Against an accident it proves as much as a cryptographic hash, at a tenth of the time.
    """
    flat = tensor.detach().contiguous().view(-1)
    begin = flat.storage_offset() * flat.element_size()
    word = next(w for w in WORDS if flat.nbytes % w.itemsize == 0 and begin % w.itemsize == 0)
    return int(flat.view(word).sum(dtype=torch.int64))
