"""The beginning that all prompts of a task share, few-shot examples mostly, read once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cofitune.evaluation.harness.choices import grows_by_copies
from cofitune.model.decode import has_key_value_cache

LEAST = 128  # tokens; a shorter beginning is read with each prompt, to the bits of the harness


def shared_length(rows: Iterable[tuple[tuple[int, ...], int]]) -> int:
    """Tokens that all rows begin with, none of which is asked for; 0 where they are few.

    Args:
        rows: tokens to read, and at how many of their last ones the model's answer counts.
    """
    given = list(rows)
    least, most = min(row for row, _ in given), max(row for row, _ in given)
    room = min(len(row) - asked for row, asked in given)
    shared = next((n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    return shared if (shared := min(shared, room)) >= LEAST and len(given) > 1 else 0


class SharedPrefix:
    """The keys and values of a beginning. `of` makes it, and says where a model's cache cannot be continued so."""

    def __init__(self, model: PreTrainedModel, cache: Cache, length: int) -> None:
        self._model, self._cache, self._length = model, cache, length

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, ids: Sequence[int]) -> SharedPrefix | None:
        """Read it; None for a model whose cache is not keys and values alone."""
        if not has_key_value_cache(model):
            return None
        tokens = torch.tensor([list(ids)], device=model.device)
        cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
        return cls(model, cache, len(ids)) if cache is not None and grows_by_copies(cache) else None

    def score(
        self, requests: Sequence[tuple[object, Sequence[int], Sequence[int]]], dtype: torch.dtype | None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it, as the harness takes them.

        Args:
            requests: anything, the context's tokens and the continuation's.
            dtype: of the log-softmax; None: the model's.
        """
        read = [(*context, *continuation[:-1]) for _, context, continuation in requests]
        rows = list(dict.fromkeys(read))  # what differs in its last token only is read once
        logits = dict(zip(rows, self.logits(rows), strict=True))
        results = []
        for row, (_, _, continuation) in zip(read, requests, strict=True):
            own = logits[row][-len(continuation) :].log_softmax(-1, dtype=dtype)  # [K, V]
            asked = torch.tensor(list(continuation), device=own.device)
            log_probs = own.gather(-1, asked[:, None])
            results.append((float(log_probs.sum()), bool((own.argmax(-1) == asked).all())))
        return results

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the model makes of the rest of each row: logits [tokens behind the beginning, V]."""
        rests = [list(row[self._length :]) for row in rows]
        width = max(map(len, rests))
        # padded on the right: no token looks at what lies behind it
        tokens = torch.tensor([rest + [0] * (width - len(rest)) for rest in rests], device=self._model.device)
        before = [(layer.keys, layer.values) for layer in self._cache.layers]
        try:
            for layer, (keys, values) in zip(self._cache.layers, before, strict=True):
                layer.keys, layer.values = (part.expand(len(rows), -1, -1, -1) for part in (keys, values))
            out = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        finally:
            for layer, (keys, values) in zip(self._cache.layers, before, strict=True):
                layer.keys, layer.values = keys, values
        return [logits[: len(rest)] for logits, rest in zip(out.logits, rests, strict=True)]
