"""The mask seen at work: the share of the update (or of the gradient) that it leaves to each layer.

A layer's share is Σ |after| / Σ |before| over its masked elements: the L1 mean of the factors, weighted by how far each
element would have moved. In gradient mode the held rows of a fused tensor do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed

EVERY = 10  # steps between two readings


class RetainedUpdate:
    """Adds up what is masked while it is `watching`; the caller says when, because a sum reads the whole weight again.

    Attributes:
        watching: whether the masks add up what they see.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """`names`: the masked parameters, the same on every rank."""
        self._layer_of = {name: _layer(name) for name in names}
        self.layers = sorted(set(self._layer_of.values()))
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._sums = torch.zeros(len(self.layers), 2, dtype=torch.float64)  # of before and of after
        self.watching = False

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Count what would have been (an update or a gradient, any shape) and what the mask left of it.

        Parameters that are held but not masked do not count.
        """
        if name not in self._layer_of:
            return
        sums = self._sums[self._row[self._layer_of[name]]]
        for place, value in enumerate((before, after)):
            sums[place] += float(value.abs().sum(dtype=torch.float32))

    def read(self, device: torch.device) -> dict[int, float]:
        """The share of each layer since the last reading, over all ranks; every rank must call.

        A layer that would not have moved at all is left out.

        Args:
            device: where the ranks talk.
        """
        sums = self._sums.to(device, copy=True)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        self._sums.zero_()
        pairs = zip(self.layers, sums.tolist(), strict=True)
        return {layer: after / before for layer, (before, after) in pairs if before > 0}

    def watch_for(self, step: int, num_steps: int) -> None:
        """Watch in the coming step if it is a tenth one, or the last."""
        self.watching = step % EVERY == 0 or step == num_steps


def kept_sentence(share: Mapping[str, float], apply_to: str) -> str:
    """In one line, what the mask left of the updates (or gradients): the mean over layers, the least and the most."""
    least, most = min(share, key=lambda layer: share[layer]), max(share, key=lambda layer: share[layer])
    return (
        f"soft mask: left {sum(share.values()) / len(share):.0%} of the {apply_to}, from {share[least]:.0%} in layer "
        f"{least} to {share[most]:.0%} in layer {most}"
    )


def _layer(name: str) -> int:
    """A decoder layer's index is the first number in its parameters' names."""
    return int(next(part for part in name.split(".") if part.isdigit()))
