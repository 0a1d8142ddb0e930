"""Soft mask on the gradient, the paper's equation ∇̂ = (1 − I) ⊙ ∇.

Faithful, and weak under Adam: its step does not depend on the scale of a row's gradient, so a factor of 0.1 leaves
99.9 % of a row's displacement (docs/method.md, defects). Rows of importance 1 get no gradient; weight decay still moves
them. `softmask.update` is the mode that regulates the update itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cofitune.softmask.factors import Factor
from cofitune.softmask.retained import RetainedUpdate


def mask_gradients(
    model: nn.Module,
    factors: Mapping[str, Factor],
    kept: RetainedUpdate | None = None,
    held: Mapping[str, Factor] | None = None,
) -> list[RemovableHandle]:
    """Hook the leaf parameters, so that a masked gradient is what DeepSpeed reduces, accumulates and clips.

    Under ZeRO stages 1 to 3 the hook sees the whole gradient (measured), so no sharding is involved. `kept` is told,
    while it is watching, of every gradient as it was and as it is left.

    Args:
        factors: parameter name → factor, that of held rows included.
        held: parameter name → the factor of held rows alone: what they would have got does not count as lost.
    """
    parameters = dict(model.named_parameters())
    return [
        parameters[name].register_hook(_scaler(name, factor, kept, (held or {}).get(name)))
        for name, factor in factors.items()
    ]


class _scaler:
    def __init__(self, name: str, factor: Factor, kept: RetainedUpdate | None, held: Factor | None) -> None:
        self.name, self.factor, self.kept, self.held = name, factor, kept, held

    def __call__(self, gradient: Tensor) -> Tensor:
        self.factor = self.factor.to(gradient.device)
        masked = self.factor.scaled(gradient)
        if self.kept is not None and self.kept.watching:
            free = self.held.to(gradient.device).scaled(gradient) if self.held is not None else gradient
            self.kept.add(self.name, free, masked)
        return masked
