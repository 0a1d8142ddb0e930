"""The update-mode mask on a stretch of a weight, against the whole weight masked as a matrix."""

from __future__ import annotations

import pytest
import torch

from cofitune.softmask.factors import Factor
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.update import hold_back, mask_updates
from cofitune.zero import Shard

SHAPES = [(5, 7), (7, 5), (1, 6), (6, 1)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_cut_of_a_weight_equals_the_whole_masked_as_a_matrix(shape: tuple[int, int], axis: int) -> None:
    torch.manual_seed(0)
    old, new = torch.randn(shape), torch.randn(shape)
    factor = Factor(torch.rand(shape[axis]), axis)
    expected = old + factor.shaped(old) * (new - old)
    numel = old.numel()
    for start in range(numel):
        for end in range(start + 1, numel + 1):
            piece = new.flatten()[start:end].clone()
            hold_back(piece, old.flatten()[start:end].clone(), Shard("w", shape, start, 0, end - start), factor)
            torch.testing.assert_close(piece, expected.flatten()[start:end])


def test_a_bias_is_masked_element_by_element() -> None:
    old, new, values = torch.randn(6), torch.randn(6), torch.rand(6)
    piece = new[2:5].clone()
    hold_back(piece, old[2:5].clone(), Shard("b", (6,), 2, 0, 3), Factor(values, 0))
    torch.testing.assert_close(piece, (old + values * (new - old))[2:5])


def test_factor_0_keeps_the_old_bits_and_factor_1_the_new() -> None:
    old, new = torch.randn(2, 64) * 1e-3, torch.randn(2, 64) * 1e3
    piece = new.flatten().clone()
    hold_back(piece, old.flatten().clone(), Shard("w", (2, 64), 0, 0, 128), Factor(torch.tensor([0.0, 1.0]), 0))
    assert torch.equal(piece.view(2, 64)[0], old[0])
    assert torch.equal(piece.view(2, 64)[1], new[1])


def test_the_hooks_hold_back_what_an_optimizer_does_and_come_off() -> None:
    flat = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([flat], lr=1.0)
    row = [Shard("free", (2,), 0, 0, 2), Shard("w", (4, 2), 0, 2, 8)]
    mask = mask_updates(optimizer, {id(flat): row}, {"w": Factor(torch.tensor([0.0, 0.25, 0.5, 1.0]), 0)})
    flat.grad = torch.ones(10)
    optimizer.step()
    moved = torch.tensor([1, 1, 0, 0, 0.25, 0.25, 0.5, 0.5, 1, 1])
    torch.testing.assert_close(flat.detach(), 1 - moved)
    mask.remove()
    optimizer.step()
    torch.testing.assert_close(flat.detach(), -moved)


def test_gradient_mode_scales_the_gradient_of_each_row() -> None:
    model = torch.nn.Linear(3, 2)
    mask_gradients(model, {"weight": Factor(torch.tensor([0.0, 0.5]), 0)})
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None and model.bias.grad is not None
    assert model.weight.grad.tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert model.bias.grad.tolist() == [1, 1]
