"""The choices of a question, asked one after another from the one cache of their question, or each with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


def grows_by_copies(cache: Cache) -> bool:
    """Whether new keys and values make new tensors, so that a context's own stay as they were."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def choice_turns(rows: Sequence[int], cache: Cache) -> list[list[int]]:
    """Continuations, by their numbers, that run together: of each context one at a time, in the contexts' order.

    So memory holds the contexts' keys and values twice at most, however many choices there are. Where a cache cannot go
    back to its context, all run at once, each on a copy of its own.
    """
    if not grows_by_copies(cache):
        return [list(range(len(rows)))]
    turns: list[list[int]] = []
    begun = [0] * (max(rows) + 1)
    for number in sorted(range(len(rows)), key=lambda n: rows[n]):
        turn = begun[rows[number]]
        begun[rows[number]] += 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(number)
    return turns


@torch.inference_mode()
def score_whole(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """Score continuations each together with its context, from no cache: for recurrent models and hybrids.

    Args:
        pairs: tokens of a context and of its continuation, neither of them empty.

    Returns:
        Of each pair the log-likelihood of the continuation in nats, and whether greedy decoding would give it.
    """
    read = [[*context, *continuation[:-1]] for context, continuation in pairs]
    width = max(map(len, read))
    # padded on the right: neither a token nor a state looks at what lies behind it
    ids = torch.tensor([row + [0] * (width - len(row)) for row in read], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in read], device=model.device)
    first = min(len(context) for context, _ in pairs) - 1  # what comes before has no logits that count
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first).logits
    logits = logits[:, first - width :]  # some models know no logits_to_keep, and say nothing
    results = []
    for row, (context, continuation) in zip(logits, pairs, strict=True):
        begin = len(context) - 1 - first
        own = row[begin : begin + len(continuation)].float().log_softmax(-1)  # [K, V]
        asked = torch.tensor(list(continuation), device=own.device)
        results.append((float(own.gather(-1, asked[:, None]).sum()), bool((own.argmax(-1) == asked).all())))
    return results
