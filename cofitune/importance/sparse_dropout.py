"""Dropout on a CPU at the cost of what it drops: the method drops 0.3 %, and torch draws a number for every element.

Three things make torch's dropout dear there: a random number an element, a mask as large as the tensor, and attention
without its fused kernel, which knows no dropout on a CPU and so keeps every probability for the backward pass. Here the
gaps between dropped elements are drawn (they are geometric, so that the elements are dropped independently of one
another, each with probability p), and attention runs through the fused kernel, whose result is corrected at the dropped
probabilities. On a GPU torch's own kernels do all of it, and nothing here is used.

With P the probabilities, D the dropped places and g the gradient of the output O':

    O'_i = (Σ_j P_ij v_j − Σ_{j ∈ D_i} P_ij v_j) / (1 − p)
    ∂s_ij = P_ij ([j ∉ D_i] g_i·v_j / (1 − p) − g_i·O'_i)

The kernel's backward gives P_ij (a_i·v_j − a_i·b_i) for the a and b that it is told are gradient and output: with
a = g / (1 − p) and b = (1 − p) O' only the first term at dropped places is too much, and is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cofitune.training.autograd import Context

KERNEL_TYPES = (torch.float32, torch.bfloat16)
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Scaled(Context, Protocol):
    scale: float


class _Attended(Context, Protocol):
    p: float
    is_causal: bool
    scale: float


class SparseDropout(TorchFunctionMode):
    """While it is entered, `dropout` and `scaled_dot_product_attention` of CPU tensors draw only what they drop.

    The masks come from the CPU's default generator.

    Example:
        >>> with SparseDropout():
        ...     dropped = nn.functional.dropout(torch.ones(1000), p=0.5)
        >>> sorted(set(dropped.tolist()))
        [0.0, 2.0]
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch's function, or ours in its place."""
        kwargs = kwargs or {}
        if func is nn.functional.dropout:
            return _dropout_of(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return _attention_of(*args, **kwargs)
        return func(*args, **kwargs)


def dropped_places(count: int, p: float) -> Tensor:
    """Which of `count` elements are dropped, each with probability p on its own: int64, ascending."""
    found, last = [], -1.0
    while last < count - 1:
        left = (count - 1 - last) * p
        gaps = torch.empty(int(left + 4 * math.sqrt(left)) + 8, dtype=torch.float64).geometric_(p)  # 1, 2, …
        places = last + gaps.cumsum(0)
        found.append(places[places < count])
        last = float(places[-1])
    return torch.cat(found).long() if found else torch.empty(0, dtype=torch.int64)


def _dropout_of(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, its arguments under torch's names."""
    if not training or not 0 < p < 1 or inplace or input.device.type != "cpu":
        return nn.functional.dropout(input, p, training, inplace)
    result: Tensor = _Drop.apply(input, dropped_places(input.numel(), p), 1 / (1 - p))  # type: ignore[no-untyped-call]
    return result


def _attention_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, its arguments under torch's names."""
    if not 0 < dropout_p < 1 or not _has_kernel(query, key, value, attn_mask):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
    places = dropped_places(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2], dropout_p)
    own_scale = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = _DropInAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, attn_mask, places, dropout_p, is_causal, own_scale
    )
    return result


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the CPU's fused kernel takes these: [B, heads, T, D] each, all heads equally wide."""
    fits = query.device.type == "cpu" and query.dim() == 4 and query.dtype in KERNEL_TYPES
    alike = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.dtype == key.dtype == value.dtype
    plain = mask is None or (mask.dim() in (2, 4) and not mask.requires_grad)
    return fits and alike and plain and query.shape[1] % key.shape[1] == 0


class _Drop(torch.autograd.Function):
    """x · scale with 0 at some places of the flattened tensor; the gradient likewise."""

    @staticmethod
    def forward(ctx: _Scaled, x: Tensor, places: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(places)
        ctx.scale = scale
        return _scaled_without(x, places, scale)

    @staticmethod
    def backward(ctx: _Scaled, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _scaled_without(gradients[0], places, ctx.scale), None, None


def _scaled_without(x: Tensor, places: Tensor, scale: float) -> Tensor:
    result: Tensor = (x * scale).contiguous()
    result.view(-1)[places] = 0
    return result


class _DropInAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale + mask), some probabilities dropped and the others divided by 1 − p, times v."""

    @staticmethod
    def forward(
        ctx: _Attended,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        places: Tensor,
        p: float,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        output: Tensor
        output, log_sum = _forward(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        heads, rows, columns = _unravel(places, query.shape[2], key.shape[2])
        if is_causal:  # what lies behind a token has probability 0
            seen = columns <= rows
            heads, rows, columns = heads[seen], rows[seen], columns[seen]
        scores = (_take(query, heads, rows) * _take(key, heads, columns)).sum(-1, dtype=torch.float32) * scale
        if mask is not None:
            whole = mask.expand(*query.shape[:3], key.shape[2])
            scores += whole[heads // query.shape[1], heads % query.shape[1], rows, columns]
        log_sums = _take(log_sum[..., None], heads, rows)[:, 0]
        dropped = (scores - log_sums).exp_().nan_to_num_(0.0)[:, None].to(query.dtype)  # a row may see nothing
        _add(output, heads, rows, -dropped * _take(value, heads, columns))
        ctx.save_for_backward(query, key, value, mask, output, log_sum, dropped, heads, rows, columns)
        ctx.p, ctx.is_causal, ctx.scale = p, is_causal, scale
        return output / (1 - p)

    @staticmethod
    def backward(ctx: _Attended, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, log_sum, dropped, heads, rows, columns = ctx.saved_tensors
        gradient = gradients[0] / (1 - ctx.p)
        to_query, to_key, to_value = _backward(
            gradient, query, key, value, output, log_sum, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale
        )
        own = _take(gradient, heads, rows)
        too_much = -dropped * (own * _take(value, heads, columns)).sum(-1, keepdim=True) * ctx.scale
        _add(to_query, heads, rows, too_much * _take(key, heads, columns))
        _add(to_key, heads, columns, too_much * _take(query, heads, rows))
        _add(to_value, heads, columns, -dropped * own)
        return to_query, to_key, to_value, None, None, None, None, None


def _unravel(places: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Head (of all samples, counted on), row and column of places in a flattened [B, A, rows, columns]."""
    all_rows = places // columns
    heads = all_rows // rows
    return heads, all_rows - heads * rows, places - all_rows * columns


def _take(x: Tensor, heads: Tensor, tokens: Tensor) -> Tensor:
    """Rows [n, D] of x [B, A, T, D]. With one index a row it is several times faster than x[samples, heads, tokens]."""
    lines, index = _lines(x, heads, tokens)
    return lines.index_select(0, index)


def _add(x: Tensor, heads: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add values [n, D] to rows of x [B, A, T, D], in place and in their order."""
    lines, index = _lines(x, heads, tokens)
    lines.index_add_(0, index, values)
    if lines.data_ptr() != x.data_ptr():  # it lies in memory in a third way
        x.copy_(lines.view(x.shape))


def _lines(x: Tensor, heads: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, A, T, D] as lines of D, in the order in which they lie in memory, and which of them are meant."""
    count, length = x.shape[1:3]
    if not x.is_contiguous() and (by_token := x.transpose(1, 2)).is_contiguous():
        samples = heads // count
        return by_token.flatten(0, 2), (samples * length + tokens) * count + heads - samples * count
    return x.flatten(0, 2), heads * length + tokens
