"""Soft mask on the gradient, the paper's equation ∇̂ = (1 − I) ⊙ ∇.

Faithful, and weak under Adam: its step does not depend on the scale of a row's gradient, so a factor of 0.1 leaves
99.9 % of a row's displacement (METHOD.md, defect 2). Rows of importance 1 get no gradient; weight decay still moves
them. `softmask.update` is the mode that regulates the update itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cofitune.softmask.factors import Factor
from cofitune.softmask.kept import KeptShare


def mask_gradients(
    model: nn.Module, factors: Mapping[str, Factor], kept: KeptShare | None = None
) -> list[RemovableHandle]:
    """Hook the leaf parameters, so that a masked gradient is what DeepSpeed reduces, accumulates and clips.

    Under ZeRO stages 1 to 3 the hook sees the whole gradient (measured), so no sharding is involved. `kept` is told,
    while it is watching, of every gradient as it was and as it is left.
    """
    parameters = dict(model.named_parameters())
    return [parameters[name].register_hook(_scaler(name, factor, kept)) for name, factor in factors.items()]


class _scaler:
    def __init__(self, name: str, factor: Factor, kept: KeptShare | None) -> None:
        self.name, self.factor, self.kept = name, factor, kept

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.factor.values.device != gradient.device:
            self.factor = Factor(self.factor.values.to(gradient.device), self.factor.axis)
        masked = gradient * self.factor.shaped(gradient).to(gradient.dtype)
        if self.kept is not None and self.kept.watching:
            self.kept.add(self.name, gradient, masked)
        return masked
