"""From scores to importance in [0, 1], layer by layer and unit kind by unit kind.

`zscore_tanh` is the paper's and for signed scores: what stands out in either direction is important. `rank` is for
scores that are never negative, where |tanh z| would mask the least important units almost as hard as the most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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

    Example:
        >>> zscore_tanh(torch.tensor([[-1.0, 1.0], [2.0, 2.0]]))
        tensor([[0.7616, 0.7616],
                [0.0000, 0.0000]])
    """
    _check_finite(scores)
    values = scores.double()
    largest = values.abs().amax(dim=-1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1.0)  # squares of tiny scores would underflow to a std of 0
    centred = values - values.mean(dim=-1, keepdim=True)
    std = centred.square().mean(dim=-1, keepdim=True).sqrt()
    flat = std <= FLAT
    z = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std))
    return z.tanh().abs().to(scores.dtype)


def rank(scores: Tensor) -> Tensor:
    """Normalise scores layer by layer: I = the share of the layer's other units that score less.

    Monotone whatever the scores' scale and tails, so it fits the non-negative reductions. Equal scores have equal
    importance, so a layer whose units all score the same has importance 0.

    Args:
        scores: [L, units]; fp32 or fp64.

    Returns:
        [L, units] in [0, 1], of the same precision; a single highest unit has 1.

    Raises:
        UserError: a score is NaN or infinite.

    Example:
        >>> rank(torch.tensor([[0.5, 9.0, 0.1]])).tolist()
        [[0.5, 1.0, 0.0]]
    """
    _check_finite(scores)
    below = torch.searchsorted(scores.sort(dim=-1).values, scores.contiguous(), side="left")
    return (below / max(1, scores.shape[-1] - 1)).to(scores.dtype)


NORMALIZATIONS = {"zscore_tanh": zscore_tanh, "rank": rank}


def over_own_units(normalize: Callable[[Tensor], Tensor], units: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A normalisation of layers with unequally many units, each over its own; NaN in the places behind them.

    Args:
        units: of each layer; 0: it has none, and its scores are all 0.

    Example:
        >>> over_own_units(rank, (3, 2))(torch.tensor([[0.5, 9.0, 0.1], [2.0, 1.0, 0.0]])).tolist()
        [[0.5, 1.0, 0.0], [1.0, 0.0, nan]]
    """

    def each(scores: Tensor) -> Tensor:
        if set(units) <= {0, scores.shape[-1]}:
            return normalize(scores)
        result = torch.full_like(scores, math.nan)
        for layer, count in enumerate(units):
            own = slice(count or None)
            result[layer, own] = normalize(scores[layer : layer + 1, own])[0]
        return result

    return each


def _check_finite(scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        layer = int((~torch.isfinite(scores)).any(dim=-1).nonzero()[0])
        raise UserError(f"importance: layer {layer} has scores that are NaN or infinite; they cannot be normalised")
