"""Dropout that draws only what it drops: the numbers of torch's own dropout under the same mask, and fair masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from cofitune.importance.sparse_dropout import SparseDropout, _add, _take, dropped_places

P = 0.2
B, A, T, D = 2, 4, 7, 8


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention with every probability written out, and dropout on them."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return nn.functional.dropout(scores.softmax(-1), P, True) @ value


def masks(name: str) -> Tensor | None:
    """Attention masks as transformers makes them."""
    allowed = torch.ones(T, T).tril().bool().expand(B, 1, T, T).clone()
    allowed[0, :, :, -2:] = False  # padding
    allowed[0, :, range(T), range(T)] = True
    return {
        "none": None,
        "bool": allowed,
        "float": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
    }[name]


@pytest.mark.parametrize(
    ("mask", "is_causal", "key_heads", "scale"),
    [("none", True, A, None), ("none", False, A, 0.3), ("bool", False, 2, None), ("float", False, 1, None)],
)
def test_attention_and_its_gradients_are_those_by_hand(
    mask: str, is_causal: bool, key_heads: int, scale: float | None
) -> None:
    torch.manual_seed(0)
    shapes = (A, key_heads, key_heads)
    inputs = [torch.randn(B, T, heads, D).transpose(1, 2).requires_grad_() for heads in shapes]
    upstream = torch.randn(B, A, T, D)

    def run(attend: Any) -> list[Tensor]:
        torch.manual_seed(3)
        with SparseDropout():
            output = attend(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    own = run(
        lambda q, k, v: nn.functional.scaled_dot_product_attention(
            q, k, v, masks(mask), P, is_causal, scale=scale, enable_gqa=key_heads < A
        )
    )
    expected = run(lambda q, k, v: by_hand(q, k, v, masks(mask), is_causal, scale))
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
def test_rows_are_found_however_a_tensor_lies_in_memory(order: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    sizes = (B, A, T, D)
    lies = torch.randn([sizes[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
    assert lies.shape == sizes
    heads, tokens = torch.randint(B * A, (9,)), torch.randint(T, (9,))
    samples, own = heads // A, heads % A
    assert torch.equal(_take(lies, heads, tokens), lies[samples, own, tokens])
    values = torch.randn(9, D)
    expected = lies.clone().index_put_((samples, own, tokens), values, accumulate=True)
    _add(lies, heads, tokens, values)
    torch.testing.assert_close(lies, expected)


def test_a_row_that_sees_nothing_does_no_harm() -> None:
    nothing = torch.ones(1, 1, T, T).bool()
    nothing[..., 0, :] = False
    inputs = [torch.randn(1, A, T, D, requires_grad=True) for _ in range(3)]
    with SparseDropout():
        output = nn.functional.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], nothing, P)
    gradients = torch.autograd.grad(output[:, :, 1:].sum(), inputs)
    assert output[:, :, 1:].isfinite().all() and all(gradient[:, :, 1:].isfinite().all() for gradient in gradients)


def test_dropout_is_torchs_under_the_same_mask() -> None:
    x, upstream = torch.randn(5, 6, requires_grad=True), torch.randn(6, 5).T
    torch.manual_seed(1)
    with SparseDropout():
        output = nn.functional.dropout(x, P)
    torch.manual_seed(1)
    mask = torch.ones(30)
    mask[dropped_places(30, P)] = 0
    expected = x * mask.view(5, 6) / (1 - P)
    assert 0 < int((mask == 0).sum()) < 15
    for one, other in zip(
        (output, *torch.autograd.grad(output, x, upstream)),
        (expected, *torch.autograd.grad(expected, x, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("p", [0.003, 0.3])
def test_each_element_is_dropped_with_probability_p_on_its_own(p: float) -> None:
    """Counts of elements, of neighbours and of the ends, against the binomial distribution."""
    torch.manual_seed(2)
    count, draws = 300, 4000
    dropped = torch.zeros(draws, count, dtype=torch.bool)
    for row in dropped:
        places = dropped_places(count, p)
        assert bool((places.diff() > 0).all())
        row[places] = True
    pairs = dropped[:, 1:] & dropped[:, :-1]
    for found, trials, probability in (
        (int(dropped.sum()), draws * count, p),
        (int(dropped[:, 0].sum()), draws, p),
        (int(dropped[:, -1].sum()), draws, p),
        (int(pairs[:, ::2].sum()), draws * pairs[:, ::2].shape[1], p * p),
    ):
        assert stats.binomtest(found, trials, probability).pvalue > 1e-3


def test_nothing_to_drop_and_all_to_drop() -> None:
    assert len(dropped_places(0, 0.5)) == 0
    x = torch.ones(4, 4)
    with SparseDropout():
        assert torch.equal(nn.functional.dropout(x, 0.0), x)
        assert not nn.functional.dropout(x, 1.0).any()
        assert torch.equal(nn.functional.dropout(x, 0.5, training=False), x)


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 4)  # a narrower value
    torch.manual_seed(0)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(0)
    with SparseDropout():
        assert torch.equal(nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5), expected)
