"""The type of what autograd hands to a `torch.autograd.Function` of ours; torch itself names only a part of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What a forward pass keeps for its backward pass, and which gradients are wanted, one for each argument."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What was saved, in its order."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, some of which may be missing, for the backward pass."""
