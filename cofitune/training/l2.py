"""The pull towards the base: θ ← θ − rate·λ·(θ − θ_base) before each step, which L2-SP penalises the distance for.

Decoupled from AdamW, as its weight decay is (Loshchilov and Hutter, arXiv 1711.05101), and not a term of the loss
(λ/2·‖θ − θ_base‖², Li et al., arXiv 1802.01483): Adam divides a gradient by its own size, so that the penalty's would
be strongest where the loss's is smallest, and its strength would depend on neither λ nor the distance.

An Adam step moves a weight by the rate at most, about, so that under λ it comes to rest within about 1/λ of the base.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cofitune.softmask.pieces import place_of
from cofitune.zero import Flat


class DecoupledL2SP:
    """Pulls the flat fp32 shards that the inner optimizer steps on. `remove()` takes it off.

    Make it when the engine's weights are still the base's: it keeps a copy of them, 4 bytes a trained weight over all
    ranks. Under a soft mask on the update, make it after the mask: the pull is then part of what is held back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, flats: Iterable[Flat], strength: float) -> None:
        """`strength` is λ, with rate·λ < 1."""
        self._strength = strength
        self._base = {id(flat.tensor): flat.tensor.data.clone() for flat in flats}
        self._handle = optimizer.register_step_pre_hook(self._pull)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                whole, begin = place_of(flat)
                if (base := self._base.get(id(whole))) is not None:
                    flat.data.lerp_(base[begin : begin + flat.numel()], group["lr"] * self._strength)
