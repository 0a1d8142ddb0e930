"""Split-half reliability: how far importance would come out the same on other data, and under other dropout masks.

The scores of even and of odd micro-batches are normalised apart, as the whole is, and their rank correlation is taken
within each layer, where the soft mask compares units. The whole has twice the data of a half, so its own reliability is
higher: 2r / (1 + r) (Spearman and Brown, 1910). 1: the same order on any data; 0: noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from cofitune.importance_file import Reliability, known_units


def reliability(
    halves: Mapping[str, Tensor], normalize: Mapping[str, Callable[[Tensor], Tensor]], micro_batches: int
) -> dict[str, Reliability]:
    """How reliable the importance of each unit kind is.

    Args:
        halves: unit kind → [2, L, units], scores before normalisation.
        normalize: unit kind → what makes importance of its scores.
        micro_batches: of both halves; below two there is nothing to compare, and the answer is empty.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 4.0, 3.0]]])
        >>> (of_neurons,) = reliability({"ffn_neurons": scores}, {"ffn_neurons": lambda s: s}, 2).values()
        >>> round(of_neurons.split_half, 3), round(of_neurons.whole, 3)
        (0.8, 0.889)
    """
    if micro_batches < 2:
        return {}
    return {kind: _of(normalize[kind](half[0]), normalize[kind](half[1])) for kind, half in halves.items()}


def _of(even: Tensor, odd: Tensor) -> Reliability:
    by_layer = tuple(rank_correlation(one, other) for one, other in zip(even, odd, strict=True))
    known = [r for r in by_layer if not math.isnan(r)]
    split_half = sum(known) / len(known) if known else None
    return Reliability(by_layer, split_half, None if split_half is None else doubled(split_half))


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of a layer's two vectors [units]; NaN where one of them is constant.

    Without SciPy, which only the extra `eval` installs.
    """
    one, other = known_units(one), known_units(other)
    if (one == one[0]).all() or (other == other[0]).all():
        return math.nan
    a, b = (ranks - ranks.mean() for ranks in (_average_ranks(one), _average_ranks(other)))
    return float(a @ b / (a.norm() * b.norm()))


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64; equal values share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[place]


def doubled(split_half: float) -> float:
    """The reliability of twice the data: 2r / (1 + r); halves that contradict each other say that there is none."""
    r = max(0.0, split_half)
    return 2 * r / (1 + r)
