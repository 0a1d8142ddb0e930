"""Score a model on how far it has moved from the base: on the base's own answers to held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cofitune.data.batches import collate
from cofitune.data.chat import IGNORED, Example
from cofitune.data.top_k import TopK
from cofitune.evaluation.data_parallel import BatchSharding, in_batches
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.rehearsal.generate import rows_at_once
from cofitune.rehearsal.items import Rehearsal
from cofitune.training.loss import kl_from_base, supervised_logits


def score_drift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTask,
    batch_size: int,
    share: BatchSharding,
) -> TaskResult:
    """Mean of log p_base − log p_model over the answers' tokens, or the KL divergence there; nats a token
    (training/drift.py).

    An item's score is its own nats over the mean number of tokens of an answer, so that the mean over items is the mean
    over tokens, and items can be paired and resampled. `others` has the other one of the two.
    """
    rehearsal = loaded.rehearsal
    if rehearsal is None:
        raise RuntimeError("a task of kind drift comes with its rehearsal")
    start = time.monotonic()
    places = [item.line - 1 for item in loaded.items]
    lengths = [len(rehearsal.items[place].answer_ids) for place in places]
    order = sorted(range(len(places)), key=lambda i: -lengths[i])
    result = share.run(
        in_batches(order, batch_size), lambda batch: _read(model, tokenizer, rehearsal, [places[i] for i in batch])
    )
    mean_length = sum(lengths) / len(lengths)
    own = [float(rehearsal.log_probs_of(place).double().sum()) for place in places]
    nats = {
        "drift": [base - log_prob for base, (log_prob, _) in zip(own, result, strict=True)],
        "kl": [kl for _, kl in result] if rehearsal.top_k else [],
    }
    samples = []
    for item, value, (log_prob, _) in zip(loaded.items, nats[loaded.task.metric], result, strict=True):
        samples.append(
            Sample(
                line=item.line,
                prompt=item.prompt,
                reference=item.reference,
                answer=None,
                log_likelihoods=(log_prob,),
                pick=None,
                score=value / mean_length,
            )
        )
    others = {k: sum(values) / sum(lengths) for k, values in nats.items() if values and k != loaded.task.metric}
    return TaskResult(
        title=loaded.task.title,
        category=loaded.task.category,
        metric=loaded.metric,
        raw=sum(s.score for s in samples) / len(samples),
        chance=0.0,
        samples=tuple(samples),
        seconds=time.monotonic() - start,
        others=others,
    )


def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rehearsal: Rehearsal, places: Sequence[int]
) -> list[tuple[float, float]]:
    """Each answer's log-probability under the model, and the KL divergences at its tokens; nats, summed."""
    sums: list[tuple[float, float]] = []
    for rows in rows_at_once([len(rehearsal.items[p].answer_ids) for p in places]):
        items = [rehearsal.items[places[row]] for row in rows]
        examples = [
            Example([*i.prompt_ids, *i.answer_ids], [IGNORED] * len(i.prompt_ids) + list(i.answer_ids)) for i in items
        ]
        batch = {k: v.to(model.device) for k, v in collate(examples, tokenizer.pad_token_id).items()}
        with torch.inference_mode():
            logits, targets, (row_of, _) = supervised_logits(model, batch)
            log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].double()
            kl = torch.zeros_like(log_probs)
            if rehearsal.top_k:
                stored = TopK.chain([rehearsal.probabilities_of(places[row]) for row in rows]).to(model.device)
                kl = kl_from_base(logits, stored).double()
        for row in range(len(rows)):
            mine = row_of == row
            sums.append((float(log_probs[mine].sum()), float(kl[mine].sum())))
    return sums
