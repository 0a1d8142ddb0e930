"""From scores to importance in [0, 1]: per layer and unit kind, I = |tanh z| with z the score's z-score over units."""

from __future__ import annotations

import torch
from torch import Tensor

from cofitune.errors import UserError

# Scores that differ by less than this share of the largest one are equal but for fp64 rounding.
FLAT = 16 * torch.finfo(torch.float64).eps


def zscore_tanh(scores: Tensor) -> Tensor:
    """Normalise signed scores layer by layer: I = |tanh((s − mean s) / std s)|, population std (CoFiTune, Figure 2).

    A layer whose units all score the same says nothing about any of them: its importance is 0, never NaN.

    Args:
        scores: [L, units], signed; fp32 or fp64. Not for non-negative scores, on which |tanh z| is not monotone.

    Returns:
        [L, units] in [0, 1], of the same precision.

    Raises:
        UserError: a score is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        layer = int((~torch.isfinite(scores)).any(dim=-1).nonzero()[0])
        raise UserError(f"importance: layer {layer} has scores that are NaN or infinite; they cannot be normalised")
    values = scores.double()
    largest = values.abs().amax(dim=-1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1.0)  # squares of tiny scores would underflow to a std of 0
    centred = values - values.mean(dim=-1, keepdim=True)
    std = centred.square().mean(dim=-1, keepdim=True).sqrt()
    flat = std <= FLAT
    z = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std))
    return z.tanh().abs().to(scores.dtype)
