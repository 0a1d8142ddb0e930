"""Hugging Face's `generate`, a few tokens at a time, so that rows of a batch that have ended make no more work.

`generate` itself continues a batch until its last row has ended, and computes a step of every row each time. Answers
of very different lengths (a fifth of them cut at the limit, the median half as long) waste half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

TOKENS_AT_ONCE = 16  # between two looks at which rows have ended: a look copies the cache of those that are left


def generate_rows(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    ended: Callable[[Sequence[int]], bool],
    *,
    processors: LogitsProcessorList | None = None,
    criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    on_rows: Callable[[Sequence[int]], None] = lambda rows: None,
) -> list[list[int]]:
    """Continue each row of a batch under the model's `generation_config`, which must ask for one sequence a row.

    Args:
        ids: prompts int64 [B, T], padded on the left.
        mask: their attention mask int64 [B, T].
        ended: whether a row's new tokens hold an end; it is asked about every `TOKENS_AT_ONCE` tokens.
        processors: also see the logits of each step.
        criteria: also end rows; what ends one must make `ended` true, too.
        streamer: is told of each token; for a batch of one row, which is generated in one go.
        on_rows: is told which rows of the batch the next steps are made for, in order.

    Returns:
        The new tokens of each row, up to an end at least; what follows an end means nothing.
    """
    rows = list(range(len(ids)))
    results: list[list[int]] = [[] for _ in rows]
    at_once = TOKENS_AT_ONCE if streamer is None and has_key_value_cache(model) else max_new_tokens
    cache, produced = None, 0
    while rows and produced < max_new_tokens:
        on_rows(rows)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=min(at_once, max_new_tokens - produced),
            use_cache=True,
            return_dict_in_generate=True,
            streamer=streamer,
            logits_processor=processors or LogitsProcessorList(),
            stopping_criteria=criteria or StoppingCriteriaList(),
        )
        sequences: Tensor = out.sequences
        new = sequences[:, ids.shape[1] :]
        produced += new.shape[1]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            results[row] += tokens
        left = [place for place, row in enumerate(rows) if not ended(results[row])]
        rows = [rows[place] for place in left]
        if not rows or produced >= max_new_tokens:
            break
        places = torch.tensor(left, device=ids.device)
        cache = out.past_key_values
        if len(left) < len(ids):
            cache.batch_select_indices(places)
        ids = sequences[places]
        mask = torch.cat([mask, mask.new_ones(new.shape)], dim=-1)[places]
    return results


def has_key_value_cache(model: PreTrainedModel) -> bool:
    """Whether the model's cache is keys and values alone, whose rows can be chosen and repeated.

    The state of recurrent, linear and convolution layers cannot: they have no such methods, or choose their keys alone.
    """
    if not model._supports_default_dynamic_cache():
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
