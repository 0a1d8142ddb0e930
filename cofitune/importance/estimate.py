"""Importance scores: gate gradients of the KL divergence between two dropout passes, summed over the data.

For a micro-batch, two forward passes under different dropout masks give logits f1 and f2, and
L = KL(softmax f2 ‖ softmax f1), summed over the real tokens of the whole conversation. A unit's score is ∂L/∂g at
g = 1, signed, summed over the data and divided by its number of real tokens (CoFiTune, arXiv 2404.10306, Figure 2).
Both passes read the same gate tensor and one backward runs through both, so a gate collects its gradient from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cofitune.errors import UserError
from cofitune.importance.gates import VirtualGates, seeded_dropout, virtual_gates
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.vectors import unit_counts

KL_CHUNK = 128  # token positions whose vocabulary-wide fp32 rows exist at one time
PASSES = 2


@dataclass(frozen=True)
class Scores:
    """What the data says: `values` maps each unit kind to [L, units] in fp64 on the CPU (nats a token); `tokens`."""

    values: dict[str, Tensor]
    tokens: int


def estimate(
    model: PreTrainedModel,
    micro_batches: Iterable[tuple[int, Mapping[str, Tensor]]],
    *,
    dropout: float,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Estimate the importance scores of every unit, before normalisation.

    The result depends on the micro-batches, their indices and the seed: not on their order, nor on how the ranks of
    `torch.distributed` (where it is initialised) share them out. Every rank returns the same scores.

    Args:
        model: the whole model, on this rank's device; it is left as it was found.
        micro_batches: this rank's (index in the whole data, batch with `input_ids` and `attention_mask`, [B, T]).
        dropout: probability p of both kinds of dropout.
        seed: seed of the dropout masks.
        on_batch: called after each micro-batch with its number of real tokens.

    Raises:
        UserError: no token at all, scores that are not finite, or a model that cannot be gated.
    """
    anatomy = anatomy_of(model)
    sums = {  # fp64: the order of additions, which differs between numbers of ranks, stays below fp32's rounding
        kind: torch.zeros(anatomy.num_layers, units, dtype=torch.float64, device=model.device)
        for kind, units in unit_counts(anatomy).items()
    }
    tokens = torch.zeros((), dtype=torch.int64, device=model.device)
    with virtual_gates(model, dropout) as gates:
        for index, batch in micro_batches:
            for kind, gradient in gate_gradients(model, gates, batch, index, seed).items():
                sums[kind] += gradient.sum(dim=1, dtype=torch.float64)  # signed: samples may cancel each other
            here = batch["attention_mask"].sum()
            tokens += here.to(tokens.device)
            if on_batch is not None:
                on_batch(int(here))
    return _over_ranks(sums, tokens)


def gate_gradients(
    model: PreTrainedModel, gates: VirtualGates, batch: Mapping[str, Tensor], index: int, seed: int
) -> dict[str, Tensor]:
    """Per-sample gate gradients of one micro-batch: each unit kind → [L, B, units], fp32.

    Args:
        model: a model inside `virtual_gates`.
        gates: what that context gave.
        batch: `input_ids` and `attention_mask`, each [B, T], on any device.
        index: the micro-batch's index in the whole data; with the seed it decides the dropout masks.
        seed: seed of the dropout masks.
    """
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    leaves = gates.renew(len(ids))
    logits = []
    for pass_index in range(PASSES):
        with seeded_dropout(seed, index, pass_index, model.device):
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    loss = kl_of_passes(logits[0], logits[1], mask)
    # grad(), not backward(): gradients are returned, so that none can pile up in a gate or a weight
    flat = torch.autograd.grad(loss, [gate for kind in leaves.values() for gate in kind])
    rows = iter(flat)
    return {kind: torch.stack([next(rows) for _ in layers]) for kind, layers in leaves.items()}


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


def memory_estimate(anatomy: Anatomy, bytes_per_number: int, batch_size: int, longest: int) -> dict[str, int]:
    """Roughly what one device holds at its fullest, in bytes: the weights, both passes' activations, and the logits.

    Args:
        anatomy: the model's sizes.
        bytes_per_number: of the model's precision.
        batch_size: items a micro-batch.
        longest: tokens of the longest item.
    """
    tokens = batch_size * longest
    heads = anatomy.num_heads * anatomy.head_dim
    # What autograd keeps of a layer whose weights are frozen, counted on Llama (7 % over what SmolLM2 was measured to
    # keep): fp32 copies in the two norms, and a [T, T] map a head, which a CPU makes and a GPU's kernels do not.
    numbers = 5 * heads + 4 * anatomy.intermediate_size + 2 * anatomy.hidden_size
    layer = tokens * (numbers * bytes_per_number + 2 * anatomy.hidden_size * 4)
    layer += tokens * longest * anatomy.num_heads * (3 * bytes_per_number + 1)
    rows = KL_CHUNK * anatomy.vocab_size * 4
    return {
        "weights": anatomy.num_parameters * bytes_per_number,
        "activations": PASSES * anatomy.num_layers * layer,
        # themselves, their gradients, and those gradients' chunks before they are joined
        "logits": 3 * PASSES * tokens * anatomy.vocab_size * bytes_per_number + 6 * rows,
    }


def _kl_of_chunk(first: Tensor, second: Tensor, real: Tensor) -> Tensor:
    log_p1 = first[real].float().log_softmax(dim=-1)
    log_p2 = second[real].float().log_softmax(dim=-1)
    return (log_p2.exp() * (log_p2 - log_p1)).sum()


def _over_ranks(sums: dict[str, Tensor], tokens: Tensor) -> Scores:
    """Add up the ranks' sums and divide once, by all tokens. Checks come after, so that ranks fail together."""
    if distributed.is_available() and distributed.is_initialized():
        for value in (*sums.values(), tokens):
            distributed.all_reduce(value)
    count = int(tokens)
    if count == 0:
        raise UserError("importance: the data holds not one token")
    for kind, value in sums.items():
        if not torch.isfinite(value).all():
            layer = int((~torch.isfinite(value)).any(dim=1).nonzero()[0])
            raise UserError(
                f"importance: the scores of '{kind}' in layer {layer} overflowed (NaN or infinity); try model.dtype: "
                "float32, and check that the model's weights are sound"
            )
    return Scores({kind: (value / count).cpu() for kind, value in sums.items()}, count)
