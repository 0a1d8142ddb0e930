"""RMSNorm in fewer operations, which keeps its input as it came, and not in fp32 beside it.

Autograd takes each of transformers' operations back alone: 33 calls where the formula needs 8. On a CPU the forward
pass computes what transformers' does, to the same bits, and the backward pass follows the formula. On a GPU both are
one kernel of torch where the form of the norm allows, which rounds once, at its end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from cofitune.model.norms import NormForm, norm_form


def fuse_norms(model: nn.Module) -> int:
    """Let the norms of known forms compute so; returns how many do.

    All of a model's do, whatever trains: what is kept of a frozen prefix for one region is then that of another one.
    """
    forms = [(module, norm_form(module)) for module in model.modules()]
    for module, form in forms:
        if form is not None:
            module.forward = partial(_forward, module, form)
    return sum(form is not None for _, form in forms)


def _forward(module: Any, form: NormForm, hidden: Tensor) -> Tensor:
    """What the norm's own forward pass gives."""
    weight, epsilon = module.weight, getattr(module, form.epsilon)
    if hidden.is_cuda and not form.offset and weight.dtype == hidden.dtype:
        return rms_norm(hidden, weight.shape, weight, epsilon)
    result: Tensor = _RMSNorm.apply(hidden, weight, epsilon, form)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    """x / rms(x), times the weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, form: NormForm) -> Tensor:
        """Keeps the input and, in fp32, a number for each row."""
        wide = _fp32(hidden)
        scale = (wide * wide).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        ctx.form = form
        normed = wide * scale
        if form.rounds_first and hidden.dtype != torch.float32:
            normed = normed.to(hidden.dtype)
        result = normed * _factor(weight, form)
        return result if form.rounds_first or result.dtype == hidden.dtype else result.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """With n what was normed, g the gradient times the factor, and H numbers a row: (g − n · (g · n) / H) / rms."""
        hidden, weight, scale = ctx.saved_tensors
        gradient, wide = _fp32(gradients[0]), _fp32(hidden)
        normed, of_hidden, of_weight = wide * scale, None, None
        if ctx.needs_input_grad[0]:
            of_normed = gradient * _factor(weight, ctx.form)
            along = (of_normed * normed).sum(-1, keepdim=True)
            of_hidden = torch.addcmul(of_normed, normed, along, value=-1 / wide.shape[-1]).mul_(scale)
            of_hidden = of_hidden if hidden.dtype == torch.float32 else of_hidden.to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return of_hidden, of_weight, None, None


def _factor(weight: Tensor, form: NormForm) -> Tensor:
    return 1.0 + _fp32(weight) if form.offset else weight


def _fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()
