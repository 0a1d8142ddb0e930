"""A model in vLLM behind the harness's interface, made to ask as training taught (model.py: the same of transformers).

The harness's own class for vLLM loads a model for each task, and knows no build of vLLM under another package's name
(for CPUs); this one has a model that is loaded already. Importing this module imports the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from cofitune.evaluation.asked import Asked, AskedTokens
from cofitune.evaluation.data_parallel import BatchSharding, in_batches
from cofitune.evaluation.harness.model import Request, as_token, split_stops
from cofitune.evaluation.harness.native import MAX_GEN_TOKS, render

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


class VllmLMBase(TemplateLM):
    """It asks as the harness's own class for transformers does, `batch_size` requests at a time."""

    def __init__(
        self,
        model: LLM,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        share: BatchSharding,
        think_end_token: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = int(model.llm_engine.model_config.max_model_len)
        self.think_end_token = as_token(tokenizer, think_end_token)
        self._share = share
        self._ends: list[int] = []

    @property
    def eot_token_id(self) -> int:
        """The end of text, as the tokenizer has it."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What the harness would call its own cache of prompts, which is off."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The tokens of a text, which begins as the tokenizer has texts begin."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt of the harness inside the chat template."""
        return render(self.tokenizer, chat_history, add_generation_prompt, self.tokenizer_name)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether greedy decoding would give it."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood (nats) of each whole text, in windows where it is longer than the model can read."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            # room for the token that every request generates, and for the one that the window stands behind
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 2, context_len=1)
            own = [(("", ""), *make_disjoint_window(pair)) for pair in found]
            windows += own
            counts.append(len(own))
        values = iter(self._loglikelihood_tokens(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers, each up to its own end; vLLM packs them into batches of its own."""
        batches = in_batches(range(len(requests)), self.batch_size)
        return self._share.run(batches, lambda batch: self._generate([requests[i] for i in batch]))

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: object) -> list[tuple[float, bool]]:
        batches = in_batches(range(len(requests)), self.batch_size)
        return self._share.run(batches, lambda batch: self._read([requests[i] for i in batch]))

    def _read(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        # one token is the least that vLLM generates; prompt_logprobs gives each token of the prompt and the likeliest
        reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        wholes = [[*context, *continuation][1 - self.max_length :] for _, context, continuation in requests]
        outputs = self._run(wholes, [reading] * len(wholes))
        results = []
        for (_, _, continuation), ids, output in zip(requests, wholes, outputs, strict=True):
            begin = max(1, len(ids) - len(continuation))
            places = list(zip(ids[begin:], (output.prompt_logprobs or [])[begin:], strict=True))
            found = [(token, {t: p.logprob for t, p in (of or {}).items()}) for token, of in places]
            total = sum(of[token] for token, of in found)
            results.append((float(total), all(of[token] == max(of.values()) for token, of in found)))
        return results

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        from vllm import SamplingParams

        prompts, sampling, stops = [], [], []
        for request in requests:
            context, given = request.args
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, default_max_gen_toks=MAX_GEN_TOKS))
            until = handle_stop_sequences(settings.pop("until"), eos=self._eos)
            settings.pop("do_sample", None)  # the temperature says it
            ids, length = maybe_truncate(
                self._prompt_ids(context), settings.pop("max_gen_toks"), self.max_length, verbose=False
            )
            special, strings = split_stops(self.tokenizer, until)
            ends = sorted({*self._ends, *special})
            # a string that stands in the reasoning must not end it; behind it it is looked for below
            stop = strings if self.think_end_token is None else []
            limits = {"max_tokens": length, "stop": stop, "stop_token_ids": ends, "detokenize": bool(stop)}
            sampling.append(SamplingParams(**settings, **limits))
            prompts.append(ids)
            stops.append((strings, ends))
        answers = [output.outputs[0].token_ids for output in self._run(prompts, sampling)]
        return [self._text(list(ids), *own) for ids, own in zip(answers, stops, strict=True)]

    def _run(self, prompts: Sequence[Sequence[int]], sampling: Sequence[object]) -> list[RequestOutput]:
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return list(self.model.generate(asked, list(sampling), use_tqdm=False))

    def _text(self, ids: list[int], strings: list[str], ends: list[int]) -> str:
        """An answer's text: without the token that ended it, the reasoning before it and what a stop string ends."""
        kept = ids[:-1] if ids and ids[-1] in ends else ids
        end = self.think_end_token
        if isinstance(end, int) and end in kept:
            behind = kept[len(kept) - kept[::-1].index(end) :]
            text = str(self.tokenizer.decode(behind, skip_special_tokens=True)).lstrip()
        else:
            text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return str(postprocess_generated_text(text, strings, end if isinstance(end, str) else None))

    @property
    def _eos(self) -> str | None:
        """The text of the token that the harness takes for the end."""
        return str(self.tokenizer.decode(self.eot_token_id))

    def _prompt_ids(self, context: str) -> list[int]:
        return self.tok_encode(context)


class VllmLM(VllmLMBase):
    """It is asked as training taught: prompts and given answers are the tokens that training has of them."""

    def __init__(
        self,
        model: LLM,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        share: BatchSharding,
        think_end_token: str | None = None,
        asked: Sequence[Asked] = (),
        ends: Sequence[int] = (),
    ) -> None:
        """Take what will be asked.

        Args:
            asked: the items that will be asked; the harness hands texts, and these are their tokens.
            ends: tokens that end an answer.
        """
        super().__init__(model, tokenizer, batch_size, share, think_end_token)
        self._tokens = AskedTokens(asked)
        self._ends = sorted(ends)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._tokens.of_answer(context, continuation)

    def _prompt_ids(self, context: str) -> list[int]:
        return self._tokens.of_prompt(context)

    @property
    def _eos(self) -> str | None:
        return None  # `ends` says it
