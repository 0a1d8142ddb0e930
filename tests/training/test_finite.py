"""Weights that are no numbers are refused."""

from __future__ import annotations

import pytest
import torch

from cofitune.errors import UserError
from cofitune.training.finite import check_all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_no_number_is_found(value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 5, dtype=dtype)
    bad[1, 2] = value
    with pytest.raises(UserError, match="w.1 holds NaN or infinity: training diverged"):
        check_all_finite({"w.0": torch.ones(2), "w.1": bad})


def test_huge_values_whose_sum_is_beyond_their_type_are_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    check_all_finite({"w": torch.full((1000,), largest), "i": torch.tensor([1, 2])})
