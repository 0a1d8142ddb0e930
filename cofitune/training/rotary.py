"""The rotary embedding (Su et al., arXiv 2104.09864) in fewer operations, to the same bits.

transformers turns a pair of halves (a, b) by a·cos − b·sin and b·cos + a·sin, writes the halves of a head one after the
other, and autograd takes each slice and concatenation back alone. Here the halves are exchanged by one operation, and
their sign lies in the table of sines, which all layers share. The backward pass turns the other way.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from cofitune.model.same_code import same_code

APPLY, ROTATE = "apply_rotary_pos_emb", "rotate_half"
MOST_TABLES = 4  # that are remembered: some families have one for local and one for global attention


def fuse_rotary(model: nn.Module) -> int:
    """Let the attention modules whose rotary embedding is transformers' plain one compute it so; returns how many do.

    Such a module gets the forward pass of its class, in which the name of that function stands for ours; no other
    model sees of it.
    """
    rotation, own = Rotation(), {}
    for module in model.modules():
        forward = type(module).forward
        if "forward" in vars(module) or not _rotates_plainly(forward):
            continue
        if forward not in own:
            own[forward] = _with_rotation(cast(FunctionType, forward), rotation)
        module.forward = MethodType(own[forward], module)
    return sum("forward" in vars(m) and type(m).forward in own for m in model.modules())


def _rotates_plainly(forward: object) -> bool:
    """Whether a forward pass calls the embedding as it is written out below."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    apply = forward.__globals__.get(APPLY)
    return (
        forward.__module__.startswith("transformers.")
        and APPLY in forward.__code__.co_names
        and same_code(apply, cast(FunctionType, apply_rotary_pos_emb))
        and same_code(cast(FunctionType, apply).__globals__.get(ROTATE), cast(FunctionType, rotate_half))
    )


def _with_rotation(forward: FunctionType, rotation: Rotation) -> FunctionType:
    names = {**forward.__globals__, APPLY: rotation}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


class Rotation:
    """What stands for `apply_rotary_pos_emb` in one model; it remembers the tables of the last few angles."""

    def __init__(self) -> None:
        self._tables: list[tuple[Tensor, Tensor, int, Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """Turn queries and keys [B, A, T, D] by angles [B, T, D]."""
        if cos.requires_grad or sin.requires_grad:  # angles that are learned
            return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        cosines, signed = self._table(cos, sin, unsqueeze_dim)
        result: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cosines, signed)  # type: ignore[no-untyped-call]
        return result

    def _table(self, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        for known_cos, known_sin, dim, cosines, signed in self._tables:
            if known_cos is cos and known_sin is sin and dim == unsqueeze_dim:
                return cosines, signed
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(unsqueeze_dim)
        cosines = cos.unsqueeze(unsqueeze_dim)
        self._tables = [*self._tables, (cos, sin, unsqueeze_dim, cosines, signed)][-MOST_TABLES:]
        return cosines, signed


class _Rotate(torch.autograd.Function):
    """x · cos + the exchanged halves of x · signed sin, of queries and of keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cosines: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the tables alone."""
        ctx.save_for_backward(cosines, signed)
        ctx.dtypes = q.dtype, k.dtype
        return _turn(q, cosines, signed), _turn(k, cosines, signed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of queries and keys, as autograd computes them."""
        cosines, signed = ctx.saved_tensors
        of_q, of_k = (
            _turn_back(gradient, cosines, signed).to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return of_q, of_k, None, None


def _turn(x: Tensor, cosines: Tensor, signed: Tensor) -> Tensor:
    return (x * cosines).add_(_exchanged(x) * signed)


def _turn_back(gradient: Tensor, cosines: Tensor, signed: Tensor) -> Tensor:
    return (gradient * cosines).add_(_exchanged(gradient * signed))


def _exchanged(x: Tensor) -> Tensor:
    """The halves of the last dimension in the other order."""
    shape = x.shape
    return x.view(*shape[:-1], 2, shape[-1] // 2).flip(-2).view(shape)


def apply_rotary_pos_emb(  # word by word transformers', with which `same_code` compares a family's own
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys [B, A, T, D] by angles [B, T, D], in transformers' operations."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) → (−b, a), of the halves of the last dimension."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
