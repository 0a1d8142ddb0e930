"""lm-evaluation-harness's model class, made to ask as training taught, and faster on choices.

Importing this module imports the harness; `cofitune.evaluation.score` does so when it scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers import StoppingCriteriaList as Criteria

from cofitune.data.chat import end_ids
from cofitune.data.control import control_tokens
from cofitune.evaluation.asked import Asked, AskedTokens
from cofitune.evaluation.data_parallel import BatchSharding, in_batches
from cofitune.evaluation.harness.choices import choice_turns, grows_by_copies, score_whole
from cofitune.evaluation.harness.prefix import SharedPrefix, shared_length
from cofitune.model.decode import generate_rows, has_key_value_cache

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as text, then as token ids


class ChatTemplateLMBase(HFLM):
    """The harness's own model class, answering as it does, batch by batch the same; ranks share the batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        share: BatchSharding,
        positions: int | None = None,
        add_bos_token: bool | None = None,
        think_end_token: str | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=positions,
            add_bos_token=add_bos_token,
            think_end_token=as_token(tokenizer, think_end_token),
        )
        self._share = share

    def loglikelihood(self, requests: list[object], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[object], disable_tqdm: bool = True) -> list[float]:
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers of a batch each time; the harness's own order: alike settings together, longest prompt first."""
        ask = super().generate_until
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        batches = []
        for group in groups.values():
            longest_first = sorted(group, key=lambda i: (-lengths[i], requests[i].args[0]))
            batches += in_batches(longest_first, self.batch_size)
        return self._share.run(batches, lambda batch: ask([requests[i] for i in batch], disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods (nats) of a batch each time; requests that differ in their last token only count as one."""
        ask = super()._loglikelihood_tokens
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            groups.setdefault(tuple(context + continuation[:-1]), []).append(index)

        def longest_first(group: list[int]) -> tuple[int, list[int]]:
            _, context, continuation = requests[max(group, key=lambda i: len(requests[i][2]))]
            return -len(context + continuation), context + continuation

        ordered = sorted(groups.values(), key=longest_first)
        batches = [[i for group in part for i in group] for part in in_batches(ordered, self.batch_size)]
        if prefix := self._shared_prefix(requests):
            dtype = self.softmax_dtype
            return self._share.run(batches, lambda batch: prefix.score([requests[i] for i in batch], dtype))
        return self._share.run(batches, lambda batch: ask([requests[i] for i in batch], True, override_bs))

    def _shared_prefix(self, requests: Sequence[Request]) -> SharedPrefix | None:
        """What all of them begin with, read once; None where that is short, or some are cut to fit the model."""
        wholes = [((*context, *continuation[:-1]), len(continuation)) for _, context, continuation in requests]
        if not wholes or max(len(whole) for whole, _ in wholes) > self.max_length:
            return None
        length = shared_length(wholes)
        return SharedPrefix.of(self.model, wholes[0][0][:length]) if length else None


class ChatTemplateLM(ChatTemplateLMBase):
    """A causal model in memory that is asked as training taught, behind the harness's interface.

    It departs from the harness's own class in three points:
    - prompts and given answers are the tokens that training has of them: none is added to the rendered template, and
      white space that ends a prompt stays there; the harness would move it into every choice, and so into acc_norm;
    - the choices of one question share one pass over the question (measured: 3 times as fast on four choices);
    - a stop string ends its own row; the harness runs on until the same string has come up in every row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        share: BatchSharding,
        positions: int | None = None,
        think_end_token: str | None = None,
        asked: Sequence[Asked] = (),
    ) -> None:
        """`asked`: the items that will be asked; the harness hands texts, and these are their tokens."""
        super().__init__(
            model, tokenizer, batch_size, share, positions, add_bos_token=False, think_end_token=think_end_token
        )
        self._tokens = AskedTokens(asked)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._tokens.of_answer(context, continuation)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The tokens of prompts, and which of them are no padding; both int64 [B, T]. None is too long to fit."""
        rows = [self._tokens.of_prompt(text) for text in strings]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it.

        `batch_size` contexts are read at once, longest first; then all their continuations from the contexts' cache.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(index)
        contexts = sorted(by_context, key=len, reverse=True)
        batches = [
            [i for context in part for i in by_context[context]] for part in in_batches(contexts, self.batch_size)
        ]
        return self._share.run(batches, lambda batch: self._score([requests[i] for i in batch]))

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """One batch: the contexts once each, in their order, and for each request its context's row."""
        if not has_key_value_cache(self.model):
            return self._score_whole([(context, continuation) for _, context, continuation in requests])
        rows: dict[tuple[int, ...], int] = {}
        for _, context, _ in requests:
            rows.setdefault(tuple(context), len(rows))
        return self._score_batch(list(rows), [rows[tuple(c)] for _, c, _ in requests], [c for _, _, c in requests])

    def _score_whole(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Contexts and continuations that no cache joins, longest first, `batch_size` at once.

        Contexts of like lengths go together: logits exist from the end of the shortest one on.
        """
        order = sorted(range(len(pairs)), key=lambda n: (-len(pairs[n][0]), -len(pairs[n][1])))
        results: dict[int, tuple[float, bool]] = {}
        for part in in_batches(order, self.batch_size):
            results |= dict(zip(part, score_whole(self.model, [pairs[n] for n in part]), strict=True))
        return [results[n] for n in range(len(pairs))]

    def _score_batch(
        self, contexts: Sequence[Sequence[int]], rows: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score N continuations of up to K tokens, each after `contexts[row]`; B contexts of up to C tokens."""
        width = max(map(len, contexts))
        ids = self._tensor([[0] * (width - len(c)) + list(c) for c in contexts])  # [B, C], padded on the left
        mask = self._tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        first = out.logits[:, -1]  # [B, V]: what follows the context
        results: dict[int, tuple[float, bool]] = {}
        for numbers in choice_turns(rows, out.past_key_values):
            asked = [continuations[n] for n in numbers]
            rest = self._continue(out.past_key_values, mask, [rows[n] for n in numbers], asked)
            for place, (n, tokens) in enumerate(zip(numbers, asked, strict=True)):
                logits = torch.cat([first[rows[n]][None], rest[place, : len(tokens) - 1]])  # [K, V]
                requested = self._tensor(tokens)
                log_probs = logits.float().log_softmax(-1).gather(-1, requested[:, None])  # [K, 1]
                results[n] = float(log_probs.sum()), bool((logits.argmax(-1) == requested).all())
        return [results[n] for n in range(len(rows))]

    def _continue(self, cache: Cache, mask: Tensor, rows: list[int], continuations: list[list[int]]) -> Tensor:
        """Logits [N, K-1, V] after each of their tokens but the last; row n continues from context `rows[n]`.

        The cache is left as it was, where its layers allow that.
        """
        width = max(map(len, continuations)) - 1
        if width == 0:  # one token each: the contexts' own logits say it all
            return torch.empty(len(rows), 0, self.model.config.vocab_size, device=self.device, dtype=self.model.dtype)
        index = self._tensor(rows)
        before = [(layer.keys, layer.values) for layer in cache.layers] if grows_by_copies(cache) else []
        if rows != list(range(len(mask))):  # else each context is asked for one continuation: nothing is copied
            cache.batch_select_indices(index)
        ids = self._tensor([c[:-1] + [0] * (width - len(c) + 1) for c in continuations])
        known = self._tensor([[1] * (len(c) - 1) + [0] * (width - len(c) + 1) for c in continuations])
        positions = mask[index].sum(-1, keepdim=True) + torch.arange(width, device=self.device)
        whole = torch.cat([mask[index], known], dim=-1)
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        for layer, (keys, values) in zip(cache.layers, before, strict=bool(before)):
            layer.keys, layer.values = keys, values
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Decode greedily; `context` is [B, T], padded on the left. Returns the context and what follows it."""
        ids, strings = split_stops(self.tokenizer, stop)
        ends = sorted({*end_ids(self.tokenizer, self.model.generation_config), *ids})
        stops = RowStops(self.tokenizer, strings, context.shape[1], self.think_end_token) if strings else None
        criteria = Criteria([stops] if stops else [])
        before = self.model.generation_config
        # a model's own defaults (temperature, repetition_penalty, …) would warn, or bend greedy decoding
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id
        )
        try:
            rows = generate_rows(
                self.model,
                context,
                generation_kwargs["attention_mask"],
                max_length - context.shape[1],
                lambda new: not set(ends).isdisjoint(new) or (stops is not None and stops.stand_in(new)),
                criteria=criteria,
            )
        finally:
            self.model.generation_config = before
        width = max(map(len, rows))
        new = self._tensor([row + [self.tokenizer.eos_token_id] * (width - len(row)) for row in rows])
        # decoding leaves out the special tokens only, and a model may end with one that its tokenizer does not call so
        ended = torch.isin(new, self._tensor(ends)).cumsum(-1) > 0
        return torch.cat([context, new.masked_fill(ended, self.tokenizer.eos_token_id)], dim=-1)

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


class RowStops(StoppingCriteria):
    """Ends each row as soon as one of the strings stands in its text, behind its reasoning if it thinks."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        strings: Sequence[str],
        prompt_length: int,
        think_end: str | int | None = None,
    ) -> None:
        self.tokenizer, self.strings, self.prompt_length = tokenizer, tuple(strings), prompt_length
        self.think_end = think_end
        # a token is a byte at least, so a string that is complete with the newest token lies within this many
        self.tail = max(len(s.encode("utf-8")) for s in strings) + 4

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        new = input_ids[:, self.prompt_length :]
        texts = self._behind_reasoning(new) if self.think_end is not None else self._decode(new[:, -self.tail :])
        done = [any(s in text for s in self.strings) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def stand_in(self, new: Sequence[int]) -> bool:
        """Whether one of the strings stands in the text of a row's new tokens."""
        whole = torch.tensor([list(new)])
        text = (self._behind_reasoning(whole) if self.think_end is not None else self._decode(whole))[0]
        return any(s in text for s in self.strings)

    def _behind_reasoning(self, new: Tensor) -> list[str]:
        if isinstance(self.think_end, int):
            rows = [
                row[len(row) - row[::-1].index(self.think_end) :] if self.think_end in row else []
                for row in new.tolist()
            ]
            return self._decode(rows)
        end = str(self.think_end)
        return [text.rpartition(end)[2] if end in text else "" for text in self._decode(new)]

    def _decode(self, rows: object) -> list[str]:
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))


def as_token(tokenizer: PreTrainedTokenizerBase, text: str | None) -> str | int | None:
    """The id of a special token, whose text decoding leaves out; else the text."""
    return None if text is None else control_tokens(tokenizer).get(text, text)


def split_stops(tokenizer: PreTrainedTokenizerBase, stop: Iterable[str]) -> tuple[list[int], list[str]]:
    """Sort stop strings into special tokens (decoding leaves them out: only their id is ever seen) and plain text."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    stops = [s for s in stop if s]
    return [special[s] for s in stops if s in special], [s for s in stops if s not in special]
