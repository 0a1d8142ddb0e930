"""The base answers: a batch of prompts each time, and how likely it finds each token of what it wrote.

A batch is the same on any number of ranks and whatever ran before it: its sampling is seeded by its own number, so that
an interrupted rehearsal continues to the bits of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from cofitune.data.batches import collate
from cofitune.data.chat import IGNORED, Example
from cofitune.data.template import render
from cofitune.data.top_k import TopK
from cofitune.errors import UserError
from cofitune.model.decode import generate_rows
from cofitune.training.loss import supervised_logits, top_k_of

if TYPE_CHECKING:
    from vllm import LLM

TOKENS_AT_ONCE = 1024  # answer tokens whose logits are held at once: half a gigabyte at a vocabulary of 128k
SEEDS_A_RUN = 1_000_003  # a prime keeps the batches of two seeds apart


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; `temperature` 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234


@dataclass(frozen=True)
class Answer:
    """What a model wrote: its tokens, the one that ends the turn among them where `ended`."""

    ids: tuple[int, ...]
    ended: bool


class Generator(Protocol):
    """What writes answers to a batch of prompts, given as tokens."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int) -> list[Answer]:
        """Answer batch `number`."""


class TransformersGenerator:
    """Hugging Face's `generate`."""

    def __init__(
        self, model: PreTrainedModel, ends: Sequence[int], pad_token_id: int, streamer: BaseStreamer | None = None
    ) -> None:
        """`ends`: the tokens that end an answer; `streamer`: is told of each token of a single prompt's answer."""
        self._model, self._ends, self._pad, self._streamer = model, sorted(ends), pad_token_id, streamer
        self._set = frozenset(ends)

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int) -> list[Answer]:
        return self._generate(prompts, sampling, number)

    def gives_probabilities(self, sampling: Sampling) -> bool:
        """Whether `with_probabilities` stands for `store_probabilities`: greedy decoding in float32.

        Sampling changes the logits before they are seen here, and a half precision rounds a step with a cache otherwise
        than the pass over a whole answer that training makes.
        """
        return sampling.temperature == 0 and self._model.dtype == torch.float32

    def with_probabilities(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int, k: int
    ) -> tuple[list[Answer], TopK, Tensor]:
        """Greedy answers to a batch, with the probabilities that each step came to anyway: no second pass.

        Returns:
            The answers, and what `store_probabilities` gives for them, equal but for rounding.
        """
        recorder = _Recorder(k)
        answers = self._generate(prompts, sampling, number, recorder)
        top_k, own = recorder.of([len(answer.ids) for answer in answers])
        return answers, top_k, own

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int, recorder: _Recorder | None = None
    ) -> list[Answer]:
        model, width = self._model, max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        sampled = (
            {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
        )
        torch.manual_seed(sampling.seed + SEEDS_A_RUN * (number + 1))
        before = model.generation_config
        # a model's own defaults (repetition_penalty, top_k, …) would make its answers another model's
        model.generation_config = GenerationConfig(
            do_sample=sampling.temperature > 0, eos_token_id=self._ends, pad_token_id=self._pad, **sampled
        )
        try:
            with torch.inference_mode():
                rows = generate_rows(
                    model,
                    ids,
                    mask,
                    sampling.max_new_tokens,
                    lambda new: not self._set.isdisjoint(new),
                    processors=LogitsProcessorList([recorder] if recorder else []),
                    streamer=self._streamer,
                    on_rows=recorder.start if recorder else lambda rows: None,
                )
        finally:
            model.generation_config = before
        return [cut(row, self._ends) for row in rows]


class _Recorder:
    """A logits processor that keeps the probabilities of each greedy step, and changes nothing."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._rows: Sequence[int] = ()
        self._steps: dict[int, list[TopK]] = {}  # of each row
        self._own: dict[int, list[Tensor]] = {}  # the likeliest entry's, which greedy decoding takes

    def start(self, rows: Sequence[int]) -> None:
        """The next steps are these rows'."""
        self._rows = rows
        for row in rows:
            self._steps.setdefault(row, [])
            self._own.setdefault(row, [])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        stored = top_k_of(scores, self._k)
        likeliest = stored if self._k else top_k_of(scores, 1)
        stored, own = stored.to(torch.device("cpu")), likeliest.log_probs[:, 0].cpu()
        for place, row in enumerate(self._rows):
            part = slice(place, place + 1)
            self._steps[row].append(TopK(stored.indices[part], stored.log_probs[part], stored.rest[part]))
            self._own[row].append(own[part])
        return scores

    def of(self, lengths: Sequence[int]) -> tuple[TopK, Tensor]:
        """The first tokens of each row, as many as its answer has, row after row."""
        parts = [step for row, length in enumerate(lengths) for step in self._steps[row][:length]]
        own = [step for row, length in enumerate(lengths) for step in self._own[row][:length]]
        return TopK.chain(parts), torch.cat(own)


class VllmGenerator:
    """vLLM, in this process, over all of its GPUs. Needs vLLM's own environment."""

    def __init__(self, model: LLM, ends: Sequence[int]) -> None:
        """`model`: from `cofitune.model.vllm_engine.vllm_model`; `ends`: tokens that end an answer."""
        self._llm = model
        self._ends = sorted(ends)

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int) -> list[Answer]:
        from vllm import SamplingParams

        first = sampling.seed + SEEDS_A_RUN * (number + 1)
        requested = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=first + place,  # vLLM seeds each request by itself: equal prompts are to get samples of their own
                stop_token_ids=self._ends,
                detokenize=False,
            )
            for place in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [
            cut(out.outputs[0].token_ids, self._ends) for out in self._llm.generate(asked, requested, use_tqdm=False)
        ]


def cut(ids: Sequence[int], ends: Sequence[int]) -> Answer:
    """What was generated, up to and with the first token that ends an answer."""
    for index, token in enumerate(ids):
        if token in ends:
            return Answer(tuple(ids[: index + 1]), True)
    return Answer(tuple(ids), False)


def store_probabilities(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], k: int, pad_token_id: int
) -> tuple[TopK, Tensor]:
    """Read prompts and answers once more, as training will, and keep the model's probabilities at the answers' tokens.

    Args:
        k: probabilities to keep for each token; 0: none.

    Returns:
        They, and the log-probability of each token that was written, float32: a row for each token of all answers.
    """
    parts: list[TopK] = []
    own: list[Tensor] = []
    for rows in rows_at_once([len(a.ids) for a in answers]):
        examples = [
            Example([*prompts[r], *answers[r].ids], [IGNORED] * len(prompts[r]) + list(answers[r].ids)) for r in rows
        ]
        batch = {name: value.to(model.device) for name, value in collate(examples, pad_token_id).items()}
        with torch.inference_mode():
            logits, targets, _ = supervised_logits(model, batch)
            log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            stored = top_k_of(logits, k)
        own.append(log_probs.float().cpu())
        parts.append(TopK(stored.indices.cpu(), stored.log_probs.cpu(), stored.rest.cpu()))
    return TopK.chain(parts), torch.cat(own)


def rows_at_once(lengths: Sequence[int]) -> list[list[int]]:
    """Divide rows, in order, among groups of at most `TOKENS_AT_ONCE` tokens, but one row at least."""
    groups: list[list[int]] = []
    room = 0
    for row, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = TOKENS_AT_ONCE
        groups[-1].append(row)
        room -= length
    return groups


def opening_of_user_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes before a user's text: a model that continues from there writes a prompt itself.

    After Magpie (arXiv 2406.08464), and the start-token samples of CFS (arXiv 2505.13811).

    Raises:
        UserError: the template refuses such a turn, or does not write its text.
    """
    mark = "0f6a3c1e"  # stands in for the user's text; no template writes it
    try:
        opening, found, _ = render(tokenizer, [{"role": "user", "content": mark}]).partition(mark)
    except TemplateError as error:
        raise UserError(f"rehearsal: the chat template refuses a user's turn: {error}") from error
    if not found:
        raise UserError("rehearsal: the chat template does not write the user's text, so no prompt can be continued")
    return opening
