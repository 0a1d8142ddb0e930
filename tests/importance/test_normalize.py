"""From scores to [0, 1]."""

from __future__ import annotations

import math

import pytest
import torch

from cofitune.errors import UserError
from cofitune.importance.normalize import rank, zscore_tanh


def test_it_is_the_formula_by_hand() -> None:
    scores = [[1.0, -2.0, 4.0, 0.5], [0.1, 0.2, 0.3, 0.4]]
    expected = []
    for row in scores:
        mean = sum(row) / len(row)
        std = math.sqrt(sum((s - mean) ** 2 for s in row) / len(row))
        expected.append([abs(math.tanh((s - mean) / std)) for s in row])
    torch.testing.assert_close(zscore_tanh(torch.tensor(scores)), torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_each_layer_is_normalised_alone() -> None:
    scores = torch.randn(3, 20, dtype=torch.float64)
    whole = zscore_tanh(scores)
    assert all(torch.equal(whole[i : i + 1], zscore_tanh(scores[i : i + 1])) for i in range(3))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-30, 7e12])
def test_a_layer_of_equal_scores_is_zero_never_nan(value: float) -> None:
    scores = torch.randn(3, 1001, dtype=torch.float64)
    scores[1] = value
    result = zscore_tanh(scores)
    assert bool((result[1] == 0).all())
    assert bool((result[[0, 2]] > 0).any())


def test_differences_of_rounding_are_not_blown_up_to_importance() -> None:
    one_ulp = 0.3 * (1 + torch.finfo(torch.float64).eps * torch.tensor([[0.0, 1.0, 2.0, 1.0]], dtype=torch.float64))
    assert len(set(one_ulp[0].tolist())) > 1
    assert bool((zscore_tanh(one_ulp) == 0).all())
    real = one_ulp.clone()
    real[0, 0] *= 1 + 1e-6
    assert float(zscore_tanh(real)[0, 0]) > 0.9


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e200])
def test_the_scale_of_the_scores_does_not_matter(scale: float) -> None:
    scores = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(zscore_tanh(scores * scale), zscore_tanh(scores), rtol=1e-9, atol=1e-12)


def test_a_single_unit_says_nothing() -> None:
    assert zscore_tanh(torch.tensor([[3.0], [0.0]])).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_lie_in_0_1_and_keep_their_precision(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 50, dtype=dtype)
    scores[0, 0] = 1e6
    result = zscore_tanh(scores)
    assert result.dtype == dtype
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused_with_their_layer(bad: float) -> None:
    scores = torch.randn(3, 5)
    scores[2, 1] = bad
    with pytest.raises(UserError, match="layer 2"):
        zscore_tanh(scores)


def test_rank_is_the_share_of_units_that_score_less() -> None:
    scores = torch.rand(3, 17, generator=torch.Generator().manual_seed(0))
    scores[1, 4] = scores[1, 9]
    scores[2] = 0.25
    expected = [[sum(other < s for other in row) / 16 for s in row] for row in scores.tolist()]
    torch.testing.assert_close(rank(scores), torch.tensor(expected))
    assert bool((rank(scores)[2] == 0).all())


@pytest.mark.parametrize("power", [1e-30, 1.0, 1e30])
def test_rank_is_monotone_on_any_scale(power: float) -> None:
    scores = torch.rand(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).pow(4) * power
    order = scores.argsort(dim=-1)
    assert bool((rank(scores).gather(-1, order).diff(dim=-1) > 0).all())
    assert rank(scores).amin(-1).tolist() == [0, 0]
    assert rank(scores).amax(-1).tolist() == [1, 1]


def test_zscore_tanh_is_monotone_in_distance_from_the_mean_not_in_scores() -> None:
    signed = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    far = (signed - signed.mean(-1, keepdim=True)).abs()
    assert bool((zscore_tanh(signed).gather(-1, far.argsort(-1)).diff(dim=-1) >= 0).all())
    lengths = signed.abs()
    least, middle = lengths.argmin(-1), lengths.sub(lengths.mean(-1, keepdim=True)).abs().argmin(-1)
    result = zscore_tanh(lengths)
    assert bool((result[[0, 1], least] > result[[0, 1], middle]).all())  # why `rank` exists


def test_rank_of_a_single_unit_is_zero_and_nan_is_refused() -> None:
    assert rank(torch.tensor([[3.0], [0.0]])).tolist() == [[0.0], [0.0]]
    with pytest.raises(UserError, match="layer 1"):
        rank(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
