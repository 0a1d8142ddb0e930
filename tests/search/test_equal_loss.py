"""Who drifts least at equal speciality loss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cofitune.model.region import Region
from cofitune.search.equal_loss import EqualLoss
from cofitune.search.measured import CurvePoint
from cofitune.search.trial import Trial, trial_from_json


def trial(name: str, *points: tuple[float, float], weights: int = 10, layer: int = 0) -> Trial:
    curve = tuple(CurvePoint(5 * number, loss, drift) for number, (loss, drift) in enumerate(points, start=1))
    return Trial(name, Region.span(layer, layer, ("up_proj",)), "done", 1, 0, weights, 1.0, steps=10, curve=curve)


BASE = Trial("base", None, "done", 0, 0, 0, 1.0, curve=(CurvePoint(0, 3.0, 0.0),))
LARGE = trial("large", (1.5, 0.30), (1.0, 0.50), weights=100)
SMALL = trial("small", (2.4, 0.02), (2.0, 0.08), weights=10, layer=1)
HARDLY = trial("hardly", (2.9, 0.0), (2.8, 0.001), weights=1, layer=2)


def names(trials: list[Trial]) -> list[str]:
    return [one.id for one in trials]


def test_a_slower_region_is_compared_where_both_have_learnt_equally() -> None:
    by = EqualLoss(BASE, reach=0.5)
    assert by.common_loss([LARGE, SMALL, HARDLY]) == 2.0, "the least that one which made half of the gain comes down to"
    assert by.drift_of(SMALL, 2.0) == pytest.approx(0.08)
    assert by.drift_of(LARGE, 2.0) == pytest.approx(0.30 * (3.0 - 2.0) / (3.0 - 1.5)), "before its first measurement"
    assert names(by.order([LARGE, SMALL, HARDLY])) == ["small", "large", "hardly"]


def test_drift_alone_does_not_win() -> None:
    leaky = trial("leaky", (2.4, 0.4), (2.0, 0.6), weights=5)
    assert names(EqualLoss(BASE).order([leaky, LARGE])) == ["large", "leaky"]
    assert LARGE.drift is not None and leaky.drift is not None and LARGE.drift < leaky.drift
    quick = trial("quick", (1.0, 0.2), (0.8, 0.9))  # 0.1 at a loss of 2, where small has 0.08
    assert names(EqualLoss(BASE, reach=0.4).order([quick, SMALL])) == ["small", "quick"]


def test_within_the_tolerance_the_fewest_weights_come_first() -> None:
    least = trial("least", (2.0, 0.100), (1.0, 0.200), weights=30)
    close = trial("close", (2.0, 0.105), (1.0, 0.209), weights=20, layer=1)
    clear = trial("clear", (2.0, 0.150), (1.0, 0.230), weights=10, layer=2)
    assert names(EqualLoss(BASE).order([clear, close, least])) == ["least", "close", "clear"]
    assert names(EqualLoss(BASE, tolerance=0.1).order([clear, close, least])) == ["close", "least", "clear"]
    assert names(EqualLoss(BASE, tolerance=0.2).order([least, close, clear])) == ["clear", "close", "least"]
    assert EqualLoss(BASE, tolerance=0.1).equal_up_to([-0.2, 0.1]) == -0.2, "below 0 nothing is near"


def test_of_equals_with_about_as_few_weights_the_best_learner_wins() -> None:
    """Quarters of 30 layers: the top one ties with 7 layers, and has learnt far less than the third with 8."""
    third = trial("third", (2.0, 0.050), (1.03, 0.047), weights=142, layer=15)
    top = trial("top", (2.0, 0.050), (1.34, 0.051), weights=124, layer=23)
    whole = trial("whole", (2.0, 0.050), (0.6, 0.050), weights=531)
    leaky = trial("leaky", (2.0, 0.090), (0.9, 0.300), weights=120)
    by = EqualLoss(BASE, tolerance=0.1)
    assert names(by.order([leaky, whole, top, third])) == ["third", "top", "whole", "leaky"]
    four = [leaky, whole, top, replace(third, num_trained=156)]
    assert names(by.order(four)) == ["top", "third", "whole", "leaky"], "a quarter more is as few, not more than that"


def test_who_does_not_come_so_far_ranks_behind_by_its_loss() -> None:
    less = trial("less", (2.95, 0.0), (2.9, 0.0))
    assert names(EqualLoss(BASE).order([less, HARDLY, LARGE])) == ["large", "hardly", "less"]
    assert EqualLoss(BASE).drift_of(HARDLY, EqualLoss(BASE).common_loss([HARDLY, LARGE])) is None
    everyone = EqualLoss(BASE, reach=0.05)
    assert everyone.common_loss([less, HARDLY, LARGE]) == 2.9


def test_where_nobody_gains_the_lowest_loss_is_first() -> None:
    worse, worst = trial("worse", (3.1, 0.1), (3.2, 0.2)), trial("worst", (3.4, 0.0), (3.5, 0.0))
    by = EqualLoss(BASE)
    assert by.common_loss([worst, worse]) is None and names(by.order([worst, worse])) == ["worse", "worst"]
    assert by.common_loss([]) is None and by.order([]) == []


def test_of_equals_fewer_weights_then_lower_layers_come_first() -> None:
    points = ((2.0, 0.1), (1.0, 0.2))
    trials = [trial("a", *points, weights=9), trial("b", *points, weights=3, layer=4), trial("c", *points, weights=3)]
    assert names(EqualLoss(BASE).order(trials)) == ["c", "b", "a"]
    assert EqualLoss(BASE).ranks(trials) == [-2.0, -1.0, 0.0]


def test_a_trial_with_a_curve_needs_no_score_and_survives_the_store() -> None:
    assert trial_from_json(LARGE.to_json()) == LARGE and LARGE.loss == 1.0 and LARGE.drift == 0.5
    with pytest.raises(ValueError, match="or a curve"):
        Trial("x", LARGE.region, "done", 1, 0, 1, 1.0)
