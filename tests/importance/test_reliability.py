"""Split-half reliability against ranks counted by hand, and against what repeating the estimation would give."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from cofitune.importance.normalize import rank, zscore_tanh
from cofitune.importance.reliability import doubled, rank_correlation, reliability
from cofitune.importance_file import read_reliability, reliability_entry


def obvious_rank_correlation(one: list[float], other: list[float]) -> float:
    """Pearson's correlation of average ranks, each counted one by one."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]

    a, b = ranks(one), ranks(other)
    mean = sum(a) / len(a)
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def test_the_rank_correlation_is_that_of_ranks_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)  # as where the extra `eval` is not installed
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 9, (40,), generator=generator).double() for _ in range(2))  # with ties
    assert rank_correlation(one, other) == pytest.approx(obvious_rank_correlation(one.tolist(), other.tolist()))
    assert math.isnan(rank_correlation(one, torch.ones(40).double()))


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_the_whole_datas_reliability_is_that_of_estimating_twice(noise: float) -> None:
    """Two further estimations of as much data agree with each other as the two halves of one predict."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(6, 4000, generator=generator).double()

    def half() -> Tensor:
        return truth + noise * torch.randn(6, 4000, generator=generator).double()

    (predicted,) = reliability({"ffn_neurons": torch.stack([half(), half()])}, {"ffn_neurons": lambda s: s}, 2).values()
    one, other = half() + half(), half() + half()
    repeated = sum(rank_correlation(a, b) for a, b in zip(one, other, strict=True)) / 6
    assert predicted.whole == pytest.approx(repeated, abs=0.04)


@pytest.mark.parametrize("normalize", [zscore_tanh, rank])
def test_each_layer_is_normalised_and_compared_by_itself(normalize: object) -> None:
    generator = torch.Generator().manual_seed(2)
    halves = torch.rand(2, 3, 20, generator=generator).double()
    halves[1, 0] = halves[0, 0]
    halves[:, 2] = 1.0  # no unit stands out
    (result,) = reliability({"ffn_outputs": halves}, {"ffn_outputs": normalize}, 4).values()  # type: ignore[dict-item]
    assert result.by_layer[0] == pytest.approx(1) and math.isnan(result.by_layer[2])
    even, odd = (normalize(half)[1].tolist() for half in halves)  # type: ignore[operator]
    assert result.by_layer[1] == pytest.approx(obvious_rank_correlation(even, odd))
    assert result.split_half == pytest.approx((1 + result.by_layer[1]) / 2)
    entry = reliability_entry({"ffn_outputs": result})
    again = read_reliability(entry)["ffn_outputs"]
    assert again.whole == pytest.approx(result.whole, abs=5e-4) and math.isnan(again.by_layer[2])


def test_halves_that_contradict_each_other_have_none() -> None:
    assert doubled(-0.4) == 0 and doubled(0.5) == pytest.approx(2 / 3) and doubled(1) == 1


def test_one_micro_batch_has_no_second_half() -> None:
    assert reliability({"ffn_neurons": torch.rand(2, 3, 4)}, {"ffn_neurons": rank}, 1) == {}
    assert reliability_entry({}) == {} and read_reliability({"reliability": ["odd"]}) == {}
