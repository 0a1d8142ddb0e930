"""The losses of a batch, summed over its tokens: the task's cross-entropy, and the rehearsal's.

The loss of an optimizer step, with Σ over all ranks and micro-batches of the step:

    L = Σ_task loss / N_task + w · Σ_rehearsal loss / N_rehearsal

Each sum is divided by its own global count of tokens that carry it, so that sharded training equals unsharded
whatever the lengths, and neither loss depends on how many tokens the other has. The task's loss is the cross-entropy.
The rehearsal's is the cross-entropy on the base's own answers (`nll`), or the KL divergence from the base's stored
probabilities at their tokens (`kl`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cofitune.data.batches import Batch
from cofitune.data.chat import IGNORED
from cofitune.data.top_k import TopK
from cofitune.model.varlen import conversations
from cofitune.training.head_loss import (
    CrossEntropy,
    KLFromBase,
    RowLoss,
    Silence,
    chunked_head,
    loss_at_head,
    scaling_of,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    from transformers import PreTrainedModel

    from cofitune.zero import Engine

    Model: TypeAlias = PreTrainedModel | Engine  # which are called alike; an engine has its model in `module`


def summed_loss(model: Model, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the batch's supervised tokens; logits are computed for no other.

    A batch without supervised tokens gives 0 and still runs its forward and backward.

    Args:
        batch: input_ids, attention_mask, labels, each [B, T]; the logits at position t are scored against label t + 1.
            With position_ids [B, T] the rows are packs, whose conversations transformers tells apart by them.
    """
    targets, places = _supervised(batch)
    if loss := _chunked(model, batch, CrossEntropy(targets[places])):
        return loss[0]
    logits, chosen, _ = supervised_logits(model, batch)
    return cross_entropy(logits, chosen, ignore_index=IGNORED, reduction="sum")


def rehearsal_loss(model: Model, batch: Batch, kind: str) -> Tensor:
    """The rehearsal's loss in nats, summed over the answers' tokens of the batch.

    Args:
        batch: as `summed_loss` takes it; under `kl` with the stored probabilities at its tokens (`collate`).
        kind: nll | kl.
    """
    if kind == "nll":
        return summed_loss(model, batch)
    stored = None
    if "top_k_rest" in batch:
        stored = TopK(batch["top_k_indices"], batch["top_k_log_probs"], batch["top_k_rest"])
    if loss := _chunked(model, batch, KLFromBase(stored) if stored else None):
        return loss[0]
    logits, _, _ = supervised_logits(model, batch)
    if stored is None:
        return logits[:0].sum()  # of a row without labels: 0, and part of the graph
    return kl_from_base(logits, stored).sum()


def supervised_logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Logits float32 [N, V] at the N tokens that carry a loss, their targets [N], and their rows and columns.

    A target's column is counted from the second position of all. A batch without such a token gives one, whose target
    is IGNORED.
    """
    targets, (rows, positions) = _supervised(batch)
    if rows.numel() == 0:
        rows = positions = torch.zeros(1, dtype=torch.long, device=targets.device)
    with _head_sees(model, rows, positions):
        logits = model(**_inputs(model, batch), use_cache=False).logits
    if logits.dim() == 3:  # a model whose head is no module of its own
        logits = logits[rows, positions]
    return logits.float(), targets[rows, positions], (rows, positions)


def _supervised(batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The labels from the second position on [B, T - 1], and rows and columns of those that carry a loss, [N] each."""
    targets = batch["labels"][:, 1:]
    rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
    return targets, (rows, positions)


def _inputs(model: Model, batch: Batch) -> dict[str, Any]:
    """What the forward pass is given beside the defaults.

    Positions tell packs apart, and a mask would undo that; attention is told the conversations' bounds where it can be.
    Rows padded on the right need no mask under causal attention: no token looks at the padding behind it. Without a
    mask attention runs in its fastest kernel, and grouped keys and values are not repeated. A model's own code, or one
    that does not attend by transformers' common interface, may do anything with its mask, and so gets it.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if "position_ids" in batch:
        module = getattr(model, "module", model)
        inputs["position_ids"] = batch["position_ids"]
        return inputs | conversations(module, batch)
    return inputs if works_without_mask(model) else inputs | {"attention_mask": batch["attention_mask"]}


def works_without_mask(model: Model) -> bool:
    """Whether rows padded on the right give the same at their real tokens without an attention mask."""
    module = getattr(model, "module", model)
    return type(module).__module__.startswith("transformers.") and bool(module._supports_attention_backend)


def _chunked(model: Model, batch: Batch, loss: RowLoss | None) -> list[Tensor]:
    """The summed loss, the only entry; empty where the head and its loss cannot run in chunks.

    A batch without a token that carries the loss goes the same way: under ZeRO-3 all ranks gather alike.
    """
    module = getattr(model, "module", model)
    head = chunked_head(module)
    if head is None:
        return []
    _, places = _supervised(batch)
    if loss is None or places[0].numel() == 0:
        first = torch.zeros(1, dtype=torch.long, device=batch["labels"].device)
        places, loss = (first, first), Silence()
    with loss_at_head(head, scaling_of(module), places, loss) as result:
        model(**_inputs(model, batch), use_cache=False)
    return result


def top_k_of(logits: Tensor, k: int) -> TopK:
    """The distribution of each row of logits float32 [N, V] in k + 1 classes: the k likeliest, and the rest as one."""
    k = min(k, logits.shape[-1])
    log_probs = logits.log_softmax(-1)
    values, indices = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return TopK(indices.to(torch.int32), values, rest)


def kl_from_base(logits: Tensor, base: TopK) -> Tensor:
    """KL(base ‖ model) in nats at each token [N], over the k likeliest entries of the base and the rest as one.

        Σ_i p_i · (log p_i − log q_i) + p_rest · (log p_rest − log q_rest)

    By the log sum inequality it is never above the KL divergence over the whole vocabulary; what is missing is the
    divergence inside of the rest, p_rest times that of the two distributions there.

    Args:
        logits: the model's, float32 [N, V].
        base: the base's stored probabilities at the same tokens.
    """
    indices = base.indices.long()
    chosen = logits.gather(-1, indices)  # [N, k]
    # summed from its own entries: as what is missing to 1, a small rest would be rounding, and without a gradient
    others = logits.scatter(-1, indices, torch.finfo(logits.dtype).min).logsumexp(-1)  # not -inf: of none it is nan
    normaliser = torch.logaddexp(chosen.logsumexp(-1), others)
    log_q, log_q_rest = chosen - normaliser[:, None], others - normaliser
    kl = (base.log_probs.exp() * (base.log_probs - log_q)).sum(-1)
    there = base.rest > -torch.inf
    rest = torch.where(there, base.rest, 0.0)
    return kl + torch.where(there, rest.exp() * (rest - log_q_rest), 0.0)


@contextmanager
def _head_sees(model: Model, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Inside, the head gets the hidden states [N, H] at these places of the batch, instead of all [B, T, H].

    What a model does to its logits afterwards (scaling, soft capping) goes element by element, and so stays as it is.
    The head is still called as a module: ZeRO-3 gathers its weight on that occasion.
    """
    inner: PreTrainedModel = getattr(model, "module", model)
    head: nn.Module | None = inner.get_output_embeddings()
    if head is None:
        yield
        return
    with head.register_forward_pre_hook(lambda _, args: (args[0][rows, positions],)):
        yield
