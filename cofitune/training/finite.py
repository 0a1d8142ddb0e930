"""Weights that are numbers: training that diverges in its last step leaves others, which must not be written."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cofitune.errors import UserError


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        UserError: it does.
    """
    # one pass without a copy: in float64 a sum of finite float32 values is finite
    if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64).item()):
        raise UserError(f"{name} holds NaN or infinity: training diverged; lower train.learning_rate")


def check_all_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of which one holds NaN or infinity.

    Raises:
        UserError: one does.
    """
    for name, tensor in tensors.items():
        check_finite(name, tensor)
