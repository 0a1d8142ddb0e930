"""The divergence between the two passes."""

from __future__ import annotations

import torch

from cofitune.importance.kl import KL_CHUNK, kl_of_passes


def test_kl_is_torchs_kl_of_the_second_pass_from_the_first() -> None:
    f1, f2 = torch.randn(2, 5, 11) * 3, torch.randn(2, 5, 11) * 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=f2.double()), torch.distributions.Categorical(logits=f1.double())
    )
    result = kl_of_passes(f1, f2, mask)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), (expected * mask).sum(), rtol=1e-5, atol=1e-6)
    assert float(kl_of_passes(f1, f1, mask)) == 0


def test_kl_in_chunks_has_the_values_and_gradients_of_one_piece() -> None:
    length = KL_CHUNK + 45
    f1, f2 = (torch.randn(2, length, 11, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -60:] = 0
    whole = (f2.log_softmax(-1).exp() * (f2.log_softmax(-1) - f1.log_softmax(-1))).sum(-1)[mask.bool()].sum()
    result = kl_of_passes(f1, f2, mask)
    torch.testing.assert_close(result, whole, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(result, [f1, f2]), torch.autograd.grad(whole, [f1, f2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_kl_never_looks_at_padding() -> None:
    f1, f2 = torch.randn(1, 4, 11), torch.randn(1, 4, 11)
    mask = torch.tensor([[1, 1, 0, 0]])
    expected = kl_of_passes(f1[:, :2], f2[:, :2], mask[:, :2])
    f1[:, 2:], f2[:, 2:] = float("nan"), float("inf")
    assert torch.equal(kl_of_passes(f1.requires_grad_(), f2, mask), expected)
