"""The head and the loss together, a chunk of tokens at a time: of the logits nothing is kept for the backward pass.

The gradient of a summed loss with respect to the logits is known as soon as they are, so the forward pass turns it
into the gradient of the hidden states at once (and of the head's weight, where that trains). The backward pass only
scales it.
Whole logits of N tokens would take 12·N·V bytes in fp32: themselves, their log-softmax and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cofitune.data.top_k import TopK
from cofitune.training.autograd import Context

LOGITS_AT_ONCE = 2**25  # elements of a chunk: 128 MiB in fp32
# transformers' models of these types do nothing to the head's output but what `LogitScaling` does
# (tests/training/test_head_loss.py compares each with its own logits)
KNOWN_HEADS = {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


class RowLoss(Protocol):
    """A loss that adds up over rows of logits."""

    def of_rows(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The loss in nats summed over these rows, and its gradient with respect to their logits float32 [n, V]."""


class Silence:
    """A loss of 0, of a batch without a token that carries one; its backward pass runs all the same."""

    def of_rows(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `RowLoss` says."""
        return logits.new_zeros(()), torch.zeros_like(logits)


@dataclass(frozen=True)
class CrossEntropy:
    """−log p(target), summed; `targets` int64 [N]."""

    targets: Tensor

    def of_rows(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `RowLoss` says."""
        targets = self.targets[rows, None]
        log_probs = logits.log_softmax(-1)
        loss = -log_probs.gather(-1, targets).sum()
        return loss, log_probs.exp_().scatter_add_(-1, targets, log_probs.new_full((1, 1), -1.0).expand_as(targets))


@dataclass(frozen=True)
class KLFromBase:
    """KL(base ‖ model) over the base's stored classes, summed (`cofitune.training.loss.kl_from_base` defines it).

    With q = softmax of the logits, p the base's stored probabilities, p_r and q_r those of the rest, and P = Σ p + p_r:
    the gradient is P·q_j − p_j at a stored entry, and P·q_j − p_r·q_j/q_r at every other.
    """

    base: TopK

    def of_rows(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `RowLoss` says."""
        indices, log_p, log_rest = self.base.indices[rows].long(), self.base.log_probs[rows], self.base.rest[rows]
        chosen = logits.gather(-1, indices)
        # summed from its own entries: as what is missing to 1, a small rest would be rounding
        logits.scatter_(-1, indices, torch.finfo(logits.dtype).min)  # not -inf: of none it is nan
        others = logits.logsumexp(-1)
        normaliser = torch.logaddexp(chosen.logsumexp(-1), others)
        log_q, log_q_rest = chosen - normaliser[:, None], others - normaliser
        p, there = log_p.exp(), log_rest > -torch.inf
        rest = torch.where(there, log_rest, 0.0)
        p_rest = torch.where(there, rest.exp(), 0.0)
        loss = (p * (log_p - log_q)).sum() + (p_rest * (rest - log_q_rest)).sum()
        mass = p.sum(-1) + p_rest
        # among the others the softmax is 1 in sum; the whole softmax there is that times q_r
        within = logits.sub_(others[:, None]).exp_()
        gradient = within.mul_((mass * log_q_rest.exp() - p_rest)[:, None])
        return loss, gradient.scatter_(-1, indices, mass[:, None] * log_q.exp() - p)


@dataclass(frozen=True)
class LogitScaling:
    """What a model does to its head's output, in its own precision: × `times`, / `divided_by`, then soft capping."""

    times: float | None = None
    divided_by: float | None = None
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """The model's logits of its head's output."""
        if self.times is not None:
            logits = logits * self.times
        if self.divided_by is not None:
            logits = logits / self.divided_by
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def pull_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the head's output, made in place from that of the `logits` [n, V] that `apply` gave."""
        if self.cap is not None:
            gradient *= 1 - (logits.float() / self.cap).square()
        if self.times is not None:
            gradient *= self.times
        if self.divided_by is not None:
            gradient /= self.divided_by
        return gradient


def chunked_head(model: nn.Module) -> nn.Linear | None:
    """The model's head, where its loss can be taken a chunk at a time; None for a model whose code is unknown."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in KNOWN_HEADS or not type(model).__module__.startswith("transformers."):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head if type(head) is nn.Linear and "forward" not in vars(head) else None


def scaling_of(model: nn.Module) -> LogitScaling:
    """What one of the models in `KNOWN_HEADS` does to its logits."""
    config = model.config
    return LogitScaling(
        times=getattr(model, "logit_scale", None),
        divided_by=getattr(config, "logits_scaling", None),
        cap=getattr(config, "final_logit_softcapping", None),
    )


@contextmanager
def loss_at_head(
    head: nn.Linear, scaling: LogitScaling, places: tuple[Tensor, Tensor], loss: RowLoss
) -> Iterator[list[Tensor]]:
    """Inside, the model's forward pass leaves the summed loss in the list, and makes no logits.

    The head is still called as a module, and the loss is its output: ZeRO-3 gathers its weight on the way in, and sees
    its backward pass begin and end.

    Args:
        places: rows and columns of the batch [B, T] whose hidden states are scored, [N] each.
    """

    def loss_of(hidden: Tensor) -> Tensor:
        keep = torch.is_grad_enabled()
        value: Tensor = _HeadLoss.apply(hidden[places], head.weight, head.bias, scaling, loss, keep)  # type: ignore[no-untyped-call]
        return value

    with head_replaced(head, loss_of) as result:
        yield result


@contextmanager
def head_replaced(head: nn.Linear, loss_of: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Inside, the head makes a loss of the hidden states [B, T, H] and leaves it in the list, and makes no logits."""
    result: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        return loss_of(hidden)

    def take(_: nn.Module, __: object, value: Tensor) -> Tensor:
        result.append(value)
        return value.new_zeros(1, 1)  # what the model takes for its logits, and nobody reads

    head.forward = forward  # type: ignore[method-assign, assignment]
    handle = head.register_forward_hook(take)  # behind DeepSpeed's own hooks, which wrap the value
    try:
        yield result
    finally:
        handle.remove()
        del head.forward


class _HeadContext(Context, Protocol):
    dtype: torch.dtype


class _HeadLoss(torch.autograd.Function):
    """The loss of hidden states [N, H]; its gradients are made in the forward pass, summed in fp32."""

    @staticmethod
    def forward(
        ctx: _HeadContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: LogitScaling,
        loss: RowLoss,
        keep: bool,
    ) -> Tensor:
        """The loss, a scalar in fp32. `keep`: whether there will be a backward pass."""
        wants = [keep and wanted for wanted in ctx.needs_input_grad[:3]]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if wants[0] else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        at_once = max(1, LOGITS_AT_ONCE // len(weight))
        for begin in range(0, len(hidden), at_once):
            rows = slice(begin, begin + at_once)
            made = scaling.apply(nn.functional.linear(hidden[rows], weight, bias))
            # a loss may write into its logits, which soft capping reads once more
            copied = made.float() if made.dtype != torch.float32 or scaling.cap is None else made.clone()
            value, gradient = loss.of_rows(copied, rows)
            total += value
            if not any(wants):
                continue
            gradient = scaling.pull_back(gradient, made)
            if to_weight is not None:
                to_weight.addmm_(gradient.T, hidden[rows].float())
            if to_bias is not None:
                to_bias += gradient.sum(0)
            if to_hidden is not None:
                torch.mm(gradient.to(weight.dtype), weight, out=to_hidden[rows])
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: _HeadContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times that of the loss."""
        (scale,) = gradients
        kept: tuple[Tensor | None, ...] = ctx.saved_tensors
        to_hidden, *to_parameters = kept
        hidden = None if to_hidden is None else to_hidden * scale.to(to_hidden.dtype)
        parameters = [None if g is None else (g * scale).to(ctx.dtype) for g in to_parameters]
        return hidden, *parameters, None, None, None
