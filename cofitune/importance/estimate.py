"""Importance scores: gate gradients of a loss on general data, reduced over the samples and summed over the data.

Two estimators share the gates, the sums and the file: `kl_dropout`, the paper's (`cofitune.importance.kl`), and
`fisher` (`cofitune.importance.fisher`). A third, `wanda`, looks at input columns and takes no gradient
(`cofitune.importance.wanda`). A gate is a row a sample, so one backward gives every sample's own gradient:

- `signed`: Σ ∂L_n/∂g, divided by the data's real tokens. The published code's; samples may cancel each other.
- `absolute`: 1/N Σ |∂L_n/∂g|. DAS's formula (Ke et al., arXiv 2302.03241).
- `squared`: 1/N Σ (∂L_n/∂g)². With `fisher`, the empirical Fisher information.

L_n is summed over the tokens of sample n, N counts the samples. A sample is an item: of one that is several examples
(one a response, where the template rewrites earlier turns), L_n is summed over all of them. With several pairs of
dropout passes ∂L_n/∂g is their mean. Even and odd micro-batches are summed apart, so that
`cofitune.importance.reliability` can say how far two halves of the data, under other dropout masks, agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cofitune.data.chat import IGNORED
from cofitune.importance.by_item import ITEMS, count_items, sum_by_item
from cofitune.importance.fisher import response_loss
from cofitune.importance.gates import VirtualGates, virtual_gates
from cofitune.importance.kl import KL_CHUNK, PASSES, kl_loss
from cofitune.importance.sums import HALVES, Scores, Sums, over_ranks
from cofitune.importance.wanda import column_scores, watched_inputs
from cofitune.importance_file import COLUMNS, ROWS, unit_counts
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.training.memory import gathered_at_once

KL_DROPOUT, FISHER, WANDA = "kl_dropout", "fisher", "wanda"
PASSES_OF = {KL_DROPOUT: PASSES, FISHER: 1, WANDA: 0}  # forward passes of a micro-batch that one backward runs through
AXIS_OF = {KL_DROPOUT: ROWS, FISHER: ROWS, WANDA: COLUMNS}  # what of a weight a unit's importance is for
ScoresOf = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]  # of a micro-batch: unit kind → [L, units], fp64
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # [L, B, units] → [L, units], fp64
    "signed": lambda gradient: gradient.sum(dim=1, dtype=torch.float64),
    "absolute": lambda gradient: gradient.abs().sum(dim=1, dtype=torch.float64),
    "squared": lambda gradient: gradient.double().square().sum(dim=1),
}


@dataclass(frozen=True)
class EstimatorSettings:
    """How importance is estimated.

    Attributes:
        dropout: probability p of both kinds of dropout; of `kl_dropout` alone.
        seed: seed of the dropout masks.
        estimator: kl_dropout | fisher | wanda.
        reduce: signed | absolute | squared.
        pairs: pairs of dropout passes over each micro-batch, whose gradients are averaged; of `kl_dropout` alone.
    """

    dropout: float
    seed: int
    estimator: str = KL_DROPOUT
    reduce: str = "signed"
    pairs: int = 1


def no_sums(anatomy: Anatomy, estimator: str = KL_DROPOUT) -> Sums:
    """The sums before the first micro-batch, on the CPU."""
    counts = unit_counts(anatomy, AXIS_OF[estimator])
    return Sums({kind: torch.zeros(HALVES, anatomy.num_layers, n, dtype=torch.float64) for kind, n in counts.items()})


def estimate(
    model: PreTrainedModel,
    micro_batches: Iterable[tuple[int, Mapping[str, Tensor]]],
    settings: EstimatorSettings,
    *,
    sums: Sums | None = None,
    on_batch: Callable[[int], None] | None = None,
    anatomy: Anatomy | None = None,
    idle: int = 0,
) -> Scores:
    """Estimate the importance scores of every unit, before normalisation.

    The result depends on the micro-batches, their indices and the seed: not on their order, nor on how the ranks of
    `torch.distributed` (where it is initialised) share them out. Every rank returns the same scores.

    Args:
        model: the model on this rank's device, whole or sharded by ZeRO-3; it is left as it was found.
        micro_batches: this rank's (index in the whole data, batch with `input_ids`, `attention_mask` and, for
            `fisher`, `labels`, each [B, T], and `items` [B] where items have several rows) that are not in `sums` yet.
        sums: where to continue from, added to in place; None: from nothing.
        on_batch: called after each micro-batch with its number of real tokens.
        anatomy: the model's; None: it is in the table of layouts.
        idle: how many micro-batches another rank has more than this one. Where the weights are sharded all ranks must
            run equally many forward passes, so that this one runs as many over two tokens, which count for nothing.

    Raises:
        UserError: no token at all, scores that are not finite, or a model that cannot be gated.
    """
    anatomy = anatomy or anatomy_of(model)
    sums = sums or no_sums(anatomy, settings.estimator)
    with _estimator(model, anatomy, settings) as scores_of:
        for index, batch in micro_batches:
            for kind, scores in scores_of(index, batch).items():
                sums.values[kind][index % HALVES] += scores.to(sums.values[kind].device)
            here = int(batch["attention_mask"].sum())
            sums.tokens += here
            sums.samples += count_items(batch)
            sums.micro_batches += 1
            if on_batch is not None:
                on_batch(here)
        for _ in range(idle):
            scores_of(0, _two_tokens())
    by_columns = settings.estimator == WANDA
    found = over_ranks(sums, model.device, per_token=by_columns or settings.reduce == "signed")
    return column_scores(found, model, anatomy) if by_columns else found


@contextmanager
def _estimator(model: PreTrainedModel, anatomy: Anatomy, settings: EstimatorSettings) -> Iterator[ScoresOf]:
    """What a micro-batch adds to the sums."""
    if settings.estimator == WANDA:
        with watched_inputs(model, anatomy) as squares_of:
            yield lambda _, batch: squares_of(batch)
        return
    reduction = REDUCTIONS[settings.reduce]
    with virtual_gates(model, settings.dropout if settings.estimator == KL_DROPOUT else 0.0, anatomy) as gates:

        def scores_of(index: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # one backward pass gives a gradient a sample at every unit's gate: [L, B, units] a kind of unit
            found = mean_gradients(model, gates, batch, index, settings)
            return {kind: reduction(sum_by_item(gradient, batch)) for kind, gradient in found.items()}

        yield scores_of


def mean_gradients(
    model: PreTrainedModel, gates: VirtualGates, batch: Mapping[str, Tensor], index: int, settings: EstimatorSettings
) -> dict[str, Tensor]:
    """As `gate_gradients`, the mean over the settings' pairs of dropout passes."""
    seed, estimator, pairs = settings.seed, settings.estimator, settings.pairs
    means = gate_gradients(model, gates, batch, index, seed, estimator)
    for pair in range(1, pairs):
        for kind, gradient in gate_gradients(model, gates, batch, index, seed, estimator, pair).items():
            means[kind] += gradient
    return means if pairs == 1 else {kind: total / pairs for kind, total in means.items()}


def gate_gradients(
    model: PreTrainedModel,
    gates: VirtualGates,
    batch: Mapping[str, Tensor],
    index: int,
    seed: int,
    estimator: str = KL_DROPOUT,
    pair: int = 0,
) -> dict[str, Tensor]:
    """Per-sample gate gradients of one micro-batch: each unit kind → [L, B, units], fp32; 0 where a layer has fewer.

    Args:
        model: a model inside `virtual_gates`.
        gates: what that context gave.
        batch: `input_ids`, `attention_mask` and, for `fisher`, `labels`, each [B, T], on any device.
        index: the micro-batch's index in the whole data; with seed and pair it decides the dropout masks.
        seed: seed of the dropout masks.
        pair: which pair of dropout passes, counted from 0.
    """
    batch = {name: value.to(model.device) for name, value in batch.items() if name != ITEMS}
    leaves = gates.renew(len(batch["input_ids"]))
    loss = kl_loss(model, batch, index, seed, pair) if estimator == KL_DROPOUT else response_loss(model, batch)
    # grad(), not backward(): gradients are returned, so that none can pile up in a gate or a weight
    present = [gate for kind, layers in leaves.items() for i, gate in enumerate(layers) if gates.has(kind, i)]
    rows = iter(torch.autograd.grad(loss, present))
    found = {
        kind: [next(rows) if gates.has(kind, i) else torch.zeros_like(g) for i, g in enumerate(layers)]
        for kind, layers in leaves.items()
    }
    most = {kind: max(row.shape[1] for row in layers) for kind, layers in found.items()}
    return {kind: torch.stack([pad(g, (0, most[kind] - g.shape[1])) for g in layers]) for kind, layers in found.items()}


def _two_tokens() -> dict[str, Tensor]:
    """A micro-batch that costs next to nothing, and whose responses are empty."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}


def memory_estimate(
    anatomy: Anatomy, bytes_per_number: int, batch_size: int, longest: int, passes: int = PASSES, shared_by: int = 1
) -> dict[str, int]:
    """Roughly what one device holds at its fullest, in bytes: the weights, all passes' activations, and the logits.

    Args:
        anatomy: the model's sizes.
        bytes_per_number: of the model's precision.
        batch_size: items a micro-batch.
        longest: tokens of the longest item.
        passes: forward passes that one backward runs through; 0: there is none, and no layer's activations are kept.
        shared_by: ranks that share the weights; 1: each holds them all.
    """
    tokens = batch_size * longest
    heads = anatomy.num_heads * anatomy.head_dim
    # What autograd keeps of a layer whose weights are frozen, counted on Llama (7 % over what SmolLM2 was measured to
    # keep): fp32 copies in the two norms, and a [T, T] map a head, which a CPU makes and a GPU's kernels do not.
    numbers = 5 * heads + 4 * anatomy.intermediate_size + 2 * anatomy.hidden_size
    layer = tokens * (numbers * bytes_per_number + 2 * anatomy.hidden_size * 4)
    layer += tokens * longest * anatomy.num_heads * (3 * bytes_per_number + 1)
    weights = anatomy.num_parameters // shared_by + (gathered_at_once(anatomy) if shared_by > 1 else 0)
    rows = KL_CHUNK * anatomy.vocab_size * 4
    return {
        "weights": weights * bytes_per_number,
        "activations": max(1, passes * anatomy.num_layers) * layer,
        # themselves, their gradients, and those gradients' chunks before they are joined
        "logits": (3 * passes * tokens * anatomy.vocab_size * bytes_per_number + 6 * rows) if passes else 0,
    }
