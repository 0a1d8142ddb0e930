"""KL between two dropout passes: the loss whose gate gradients CoFiTune sums up (arXiv 2404.10306, Figure 2).

Two forward passes of a micro-batch under different dropout masks give logits f1 and f2, and
L = KL(softmax f2 ‖ softmax f1), summed over the real tokens of the whole conversation. Both passes read the same gate
tensor and one backward runs through both, so a gate collects its gradient from both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cofitune.importance.gates import seeded_dropout
from cofitune.zero import restore_backward_counters

KL_CHUNK = 128  # token positions whose vocabulary-wide fp32 rows exist at one time
PASSES = 2


def kl_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], index: int, seed: int) -> Tensor:
    """The divergence of a micro-batch's two passes, a scalar in nats, summed over its real tokens.

    Args:
        model: a model inside `virtual_gates`, its gates renewed.
        batch: `input_ids` and `attention_mask`, each [B, T], on the model's device.
        index: the micro-batch's index in the whole data; with the seed it decides the dropout masks.
        seed: seed of the dropout masks.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = []
    for pass_index in range(PASSES):
        with seeded_dropout(seed, index, pass_index, ids.device):
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        restore_backward_counters(model, logits[-1])
    return kl_of_passes(logits[0], logits[1], mask)


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
