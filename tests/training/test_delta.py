"""The delta in a model for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cofitune.errors import ArtifactError
from cofitune.training.delta import Delta, delta_applied


def test_a_delta_goes_in_and_comes_out_again_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    delta = Delta({"1.weight": torch.randn(2, 4), "1.bias": torch.randn(2)}, {}, "")
    with pytest.raises(KeyboardInterrupt), delta_applied(model, delta):
        for name, parameter in model.named_parameters():
            requested = delta.tensors[name].to(torch.bfloat16) if name in delta.tensors else before[name]
            assert torch.equal(parameter, requested)
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_delta_without_its_place_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(3, 4)
    before = model.weight.detach().clone()
    with (
        pytest.raises(ArtifactError, match="'s bias .* has no place in this model"),
        delta_applied(model, Delta({"weight": torch.zeros(4, 3), "bias": torch.zeros(5)}, {}, "")),
    ):
        pass
    assert torch.equal(model.weight, before)
