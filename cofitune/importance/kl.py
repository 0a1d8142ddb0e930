"""KL between two dropout passes: the loss whose gate gradients CoFiTune sums up (arXiv 2404.10306, Figure 2).

Two forward passes of a micro-batch under different dropout masks give logits f1 and f2, and
L = KL(softmax f2 ‖ softmax f1), summed over the real tokens of the whole conversation. Both passes read the same gate
tensor and one backward runs through both, so a gate collects its gradient from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cofitune.importance.gates import seeded_dropout
from cofitune.training.autograd import Context
from cofitune.training.head_loss import LogitScaling, chunked_head, head_replaced, scaling_of
from cofitune.zero import restore_backward_counters

KL_CHUNK = 256  # token positions whose vocabulary-wide fp32 rows exist at one time
CACHED_BYTES = 2**21  # of one fp32 tensor that a CPU works on at one time: the handful of them stays in its cache
PASSES = 2
Places = tuple[Tensor, ...]  # rows and columns of the real tokens, [N] each


def kl_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], index: int, seed: int, pair: int = 0) -> Tensor:
    """The divergence of a micro-batch's two passes, a scalar in nats, summed over its real tokens.

    Args:
        model: a model inside `virtual_gates`, its gates renewed.
        batch: `input_ids` and `attention_mask`, each [B, T], on the model's device.
        index: the micro-batch's index in the whole data; with seed and pair it decides the dropout masks.
        seed: seed of the dropout masks.
        pair: which pair of passes over the micro-batch, counted from 0.
    """
    one, two = PASSES * pair, PASSES * pair + 1
    ids, mask = batch["input_ids"], batch["attention_mask"]
    head = chunked_head(model)
    places = mask.nonzero(as_tuple=True)  # N real tokens
    if head is not None and not any(p.requires_grad for p in head.parameters()):
        return _kl_at_head(model, head, batch, places, [(seed, index, one), (seed, index, two)])
    logits = []
    for pass_index in (one, two):
        with seeded_dropout(seed, index, pass_index, ids.device):
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        restore_backward_counters(model, logits[-1])
    return kl_of_passes(logits[0], logits[1], mask)


def _kl_at_head(
    model: PreTrainedModel,
    head: nn.Linear,
    batch: Mapping[str, Tensor],
    places: Places,
    draws: Sequence[tuple[int, int, int]],
) -> Tensor:
    """As `kl_loss`, of real tokens alone, and with no logits kept; `draws` name the dropout masks of the two passes.

    The first pass leaves the hidden states that enter the head, which then sees one of them, without its graph. The
    head of the second pass takes both passes' and gives the divergence: ZeRO-3 has its weight there at that time.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden: list[Tensor] = []

    def leave(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden.append(args[0][places])  # [N, H]
        return (hidden[0][:1].detach(),)

    # before ZeRO-3's hooks, which watch what enters
    with seeded_dropout(*draws[0], ids.device), head.register_forward_pre_hook(leave, prepend=True):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    restore_backward_counters(model, hidden[0])
    scaling = scaling_of(model)

    def divergence(second: Tensor) -> Tensor:
        loss: Tensor = _KLOfHidden.apply(hidden[0], second[places], head.weight, head.bias, scaling)  # type: ignore[no-untyped-call]
        return loss

    with head_replaced(head, divergence) as result, seeded_dropout(*draws[1], ids.device):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return result[0]


class _KLOfHidden(torch.autograd.Function):
    """KL(second pass ‖ first pass) of hidden states [N, H] each, whose gradients are made a chunk of rows at a time.

    With p = softmax f1 and q = softmax f2: ∂/∂f1 = p − q, and ∂/∂f2 = q·(log q − log p − KL of the row), in which the
    normalisers of the softmax cancel: q·(f2 − f1 − Σ q·(f2 − f1)).
    """

    @staticmethod
    def forward(
        ctx: Context, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, scaling: LogitScaling
    ) -> Tensor:
        """The divergence in nats, a scalar in fp32."""
        total = torch.zeros((), dtype=torch.float32, device=first.device)
        gradients = torch.empty_like(first), torch.empty_like(second)
        room = first.new_empty(2, min(KL_CHUNK, len(first)), len(weight))  # made once: fresh memory is slow on a CPU
        for begin in range(0, len(first), KL_CHUNK):
            rows = slice(begin, begin + KL_CHUNK)
            logits = [
                scaling.apply(_head_of(hidden[rows], weight, bias, place))
                for hidden, place in zip((first, second), room, strict=True)
            ]
            few = max(1, CACHED_BYTES // (4 * weight.shape[0])) if first.device.type == "cpu" else KL_CHUNK
            for one, two in zip(*(each.split(few) for each in logits), strict=True):
                total += _replace_by_gradients(one, two, scaling)
            for made, whole in zip(logits, gradients, strict=True):
                torch.mm(made, weight, out=whole[rows])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times that of the divergence."""
        (scale,) = gradients
        first, second = (kept * scale.to(kept.dtype) for kept in ctx.saved_tensors)
        return first, second, None, None, None


def _head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    """The head's output [n, V] of hidden states [n, H], in the first n rows of `room`."""
    logits = torch.mm(hidden, weight.t(), out=room[: len(hidden)])
    return logits if bias is None else logits.add_(bias)


def _replace_by_gradients(one: Tensor, two: Tensor, scaling: LogitScaling) -> Tensor:
    """The divergence of the two passes' logits [n, V], summed; where these were lie the head's gradients then."""
    p, q = one.softmax(-1, dtype=torch.float32), two.softmax(-1, dtype=torch.float32)
    off = two.float() - one.float()
    mean = torch.linalg.vecdot(q, off).unsqueeze(-1)
    divergence: Tensor = (mean + _log_sum_exp(one, p) - _log_sum_exp(two, q)).sum()
    # written where the logits were, as far as nobody reads them any more: each pass over them takes time
    first, second = (logits if logits.dtype == p.dtype and scaling.cap is None else p for logits in (one, two))
    _put(one, scaling.pull_back(torch.sub(p, q, out=first), one))
    _put(two, scaling.pull_back(torch.mul(off.sub_(mean), q, out=second), two))
    return divergence


def _put(place: Tensor, value: Tensor) -> None:
    if value is not place:
        place.copy_(value)


def _log_sum_exp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log Σ exp of each row [n, V] of `logits`, from its softmax at the likeliest place: [n, 1], fp32."""
    return logits.amax(-1, keepdim=True).float() - probabilities.amax(-1, keepdim=True).log()


def kl_of_passes(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """KL(softmax f2 ‖ softmax f1) in fp32, summed over real token positions, in nats.

    Softmax rows are made a chunk of tokens at a time and made again in the backward pass, so that beside the model's
    own two sets of logits only `KL_CHUNK` fp32 rows of the vocabulary exist at a time.

    Args:
        first: f1, logits [B, T, V] in the model's precision.
        second: f2, the same shape.
        mask: [B, T], 1 where a token is real; padding positions are never looked at.

    Returns:
        A scalar, fp32.
    """
    chunks = zip(
        first.flatten(0, 1).split(KL_CHUNK),
        second.flatten(0, 1).split(KL_CHUNK),
        mask.flatten().bool().split(KL_CHUNK),
        strict=True,
    )
    parts = [
        checkpoint(_kl_of_chunk, one, two, real, use_reentrant=False, preserve_rng_state=False)
        for one, two, real in chunks
    ]
    return torch.stack(parts).sum()


def _kl_of_chunk(first: Tensor, second: Tensor, real: Tensor) -> Tensor:
    log_p1 = first[real].float().log_softmax(dim=-1)
    log_p2 = second[real].float().log_softmax(dim=-1)
    return (log_p2.exp() * (log_p2 - log_p1)).sum()
