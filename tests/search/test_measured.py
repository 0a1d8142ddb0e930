"""A trial's curve, and its drift where it comes down to a loss, against numpy's interpolation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cofitune.search.measured import CurvePoint, curve_from_json, curve_to_json, drift_at, lowest_loss


def curve(*points: tuple[float, float]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(4 * number, loss, drift) for number, (loss, drift) in enumerate(points))


def test_the_drift_at_a_loss_is_numpys_interpolation() -> None:
    generator = np.random.default_rng(3)
    losses = np.sort(generator.uniform(0.5, 3.0, 6))[::-1]
    drifts = np.sort(generator.uniform(0.0, 0.4, 6))
    own = curve(*zip(map(float, losses), map(float, drifts), strict=True))
    for loss in np.linspace(losses[-1], losses[0], 23):
        assert drift_at(own, float(loss)) == pytest.approx(np.interp(loss, losses[::-1], drifts[::-1]))


def test_a_loss_that_is_not_reached_has_no_drift() -> None:
    own = curve((3.0, 0.0), (2.0, 0.1))
    assert drift_at(own, 1.99) is None and drift_at(own, 2.0) == 0.1 and drift_at((), 2.0) is None
    assert drift_at(own, 3.5) == 0.0, "the base is there already"


def test_where_a_training_comes_by_twice_the_first_time_counts() -> None:
    own = curve((3.0, 0.0), (2.0, 0.2), (2.8, 0.5), (1.0, 0.9))
    assert drift_at(own, 2.5) == pytest.approx(0.1) and lowest_loss(own) == 1.0


def test_a_curve_survives_json() -> None:
    own = curve((3.0, 0.0), (2.0, 0.1))
    assert curve_from_json(json.loads(json.dumps(curve_to_json(own)))) == own
    with pytest.raises(TypeError):
        curve_from_json([{"steps": 1}])
