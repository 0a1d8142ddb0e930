"""What a trial comes to without generating: its speciality loss and its drift, a few times along its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class CurvePoint:
    """One measurement on the way of a training.

    Attributes:
        steps: optimizer steps before it; 0: the base.
        loss: mean cross-entropy of the development items' answers, in nats a token; lower is better.
        drift: KL(base ‖ model) on the base's own held-out answers where its probabilities are stored, else the mean of
            log p_base − log p_model there; nats a token, 0 for the base, lower is better.
    """

    steps: int
    loss: float
    drift: float


Curve = tuple[CurvePoint, ...]


def drift_at(curve: Sequence[CurvePoint], loss: float) -> float | None:
    """The drift where a training first comes down to a speciality loss, between two points by a straight line.

    Args:
        curve: in the order of training, the base's point first.
        loss: in nats a token.

    Returns:
        Nats a token; None where the training does not come so far.
    """
    if curve and curve[0].loss <= loss:
        return curve[0].drift
    for before, after in pairwise(curve):
        if after.loss <= loss < before.loss:
            part = (before.loss - loss) / (before.loss - after.loss)
            return before.drift + part * (after.drift - before.drift)
    return None


def lowest_loss(curve: Sequence[CurvePoint]) -> float:
    """The lowest speciality loss on a curve, in nats a token."""
    return min(point.loss for point in curve)


def curve_to_json(curve: Curve) -> list[dict[str, object]]:
    """A curve as JSON takes it."""
    return [vars(point) for point in curve]


def curve_from_json(value: Sequence[dict[str, Any]]) -> Curve:
    """Read what `curve_to_json` gave.

    Raises:
        TypeError: it is no curve.
    """
    return tuple(CurvePoint(**point) for point in value)
