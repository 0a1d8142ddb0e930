"""The base's weights held in memory, and models around them: loaded once, and the same to the bit for every trial.

One engine after another on the same model object is not sound under ZeRO-3: DeepSpeed 0.19 leaves in each module the
backward functions of its first engine (`pre_bwd_fn`), the second engine's backward pass then works on the first one's
state, and with activation checkpointing it fails. A model object costs next to nothing, its weights do: so every
training gets an object of its own, whose frozen parameters share the held tensors. What trains is copied first: where
an optimizer's group is one tensor, DeepSpeed trains under stages 1 and 2 in the very tensor that it was given. Else it
writes into none: tests/training/test_shared_base.py probes that, bit for bit against a fresh model, and `changed`
proves it after each trial.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

HOST = torch.device("cpu")
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class SharedBase:
    """A model whose weights nobody writes into. Memory-mapped weights stay in the system's page cache.

    They may lie on a GPU, too, and are then shared there: the trials of a search need not bring them each.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: on the CPU, and from now on not to be used otherwise."""
        self._model = model
        self._placed: dict[str, Tensor] = {}  # by name, what lies on another device than the host's
        self._device = HOST
        self._checksums = self._sum_up()

    def place(self, device: torch.device) -> None:
        """Let the weights that models share lie on a device from now on; those on another one are given up.

        The host's stay where they are. Models from before keep what they share.
        """
        if device == self._device:
            return
        self._placed, self._device = {}, HOST  # first: there may be no room for both
        if device != HOST:
            self._placed = {name: p.data.to(device) for name, p in self._model.named_parameters()}
            self._device = device

    def instantiate(
        self, overrides: Mapping[str, Tensor] | None = None, trains: Collection[str] = ()
    ) -> PreTrainedModel:
        """A model object of its own with these weights, which are shared and not copied, where they were placed.

        Its buffers are its own, on the CPU.

        Args:
            overrides: parameter name → tensor of the same shape that takes the place of the held one.
            trains: names of parameters that will be written into, and are copied.
        """
        overrides, own = overrides or {}, {}
        for name, parameter in self._model.named_parameters():  # tied weights once
            held = self._placed.get(name, parameter.data)
            value = overrides[name].to(held.device) if name in overrides else held
            own[id(parameter)] = nn.Parameter(value.clone() if name in trains else value)
        model: PreTrainedModel = copy.deepcopy(self._model, own)  # deepcopy takes for copied what it finds there
        return model

    def changed(self) -> list[str]:
        """The tensors that are not what they were when the model was handed over."""
        return [name for name, value in self._sum_up().items() if value != self._checksums[name]]

    def _sum_up(self) -> dict[str, int]:
        tensors = {**self._model.state_dict(), **self._placed}
        return {name: checksum(tensor) for name, tensor in tensors.items()}


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, taken as words as wide as its place allows: memory is read once, at full speed.

    Against an accident it proves as much as a cryptographic hash, at a tenth of the time.
    """
    flat = tensor.detach().contiguous().view(-1)
    begin = flat.storage_offset() * flat.element_size()
    word = next(w for w in WORDS if flat.nbytes % w.itemsize == 0 and begin % w.itemsize == 0)
    return int(flat.view(word).sum(dtype=torch.int64))
