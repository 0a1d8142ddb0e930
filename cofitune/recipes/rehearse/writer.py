"""The base at work: it writes prompts where it is to, and answers all of them, batch by batch over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.data.formats import BadItemError
from cofitune.data.read import ItemCounts
from cofitune.distributed import device
from cofitune.evaluation.data_parallel import BatchSharding, in_batches
from cofitune.model.vllm_engine import vllm_model
from cofitune.recipes.from_config import load_base
from cofitune.recipes.rehearse.plan import RehearsePlan
from cofitune.recipes.rehearse.prompts import Prompt, encode_prompt, keep_prompt, note, read_tests, shortened
from cofitune.rehearsal.filters import why_dropped
from cofitune.rehearsal.generate import (
    Answer,
    Generator,
    Sampling,
    TransformersGenerator,
    VllmGenerator,
    store_probabilities,
)
from cofitune.rehearsal.items import no_tokens
from cofitune.rehearsal.partial import AnsweredBatch, Partial
from cofitune.reports.console import say
from cofitune.reports.training.progress import CountProgress

WRITTEN = "written by the model"
NO_PROMPT = "no prompt"  # what the model wrote as one
TRIES = 4  # prompts that the model may write for each one that is wanted
# a model's prompts must differ, so they are sampled, however its answers are made
PROMPT_TEMPERATURE, PROMPT_TOP_P, PROMPT_TOKENS = 1.0, 0.95, 96


class Writer:
    """Has the model write prompts and answers, batch by batch; this rank's share of them."""

    def __init__(self, plan: RehearsePlan, world: BatchSharding, console: Console) -> None:
        self._plan, self._world, self._console = plan, world, console
        self._partial: Partial = plan.partial
        self._model: PreTrainedModel | None = None
        self._generator: Generator | None = None
        self._vllm = ExitStack()  # holds the model there

    def write_prompts(self, account: ItemCounts, examples: dict[str, list[str]]) -> list[Prompt]:
        """Prompts that the model writes itself, from where a user's turn opens.

        They are drawn in rounds of as many as are still wanted, and in all at most `TRIES` times as many.
        """
        plan, requested = self._plan, self._plan.config.rehearsal.self_prompted
        if not requested or plan.base.tokenizer is None:
            return []
        tests = read_tests((plan.config.eval, plan.config.search.eval))
        seen = {prompt.ids for prompt in plan.prompts}
        sampling = Sampling(PROMPT_TOKENS, PROMPT_TEMPERATURE, PROMPT_TOP_P, plan.sampling.seed)
        results: list[Prompt] = []
        first, tried = 0, 0
        while len(results) < requested and tried < TRIES * requested:
            count = -(-(requested - len(results)) // plan.batch_size)
            batches = [[plan.opening] * plan.batch_size for _ in range(count)]
            self._answer_missing("prompts", batches, sampling, first, with_top_k=None)
            for number in range(first, first + count):
                for answer in self._partial.get("prompts", number).answers:
                    account.read += 1
                    prompt = self._as_prompt(answer, len(results), account, examples)
                    if (
                        prompt
                        and len(results) < requested
                        and keep_prompt(prompt, seen, tests, lambda why, message: note(account, examples, why, message))
                    ):
                        results.append(prompt)
                        account.kept += 1
                        account.tokens += len(prompt.ids)
            first, tried = first + count, tried + count * plan.batch_size
        return results

    def answer(self, prompts: Sequence[Prompt]) -> tuple[list[int], list[AnsweredBatch]]:
        """Answers to all prompts, for rank 0.

        Returns:
            The prompts' places in the order in which they were asked, the longest first; and the batches. Other ranks
            have no batches: rank 0 removes the files once it has read them, and they may not be there any more.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        batches = [[prompts[i].ids for i in part] for part in in_batches(order, self._plan.batch_size)]
        sampling, top_k = self._plan.sampling, self._plan.config.rehearsal.top_k
        if self._plan.engine == "vllm":  # which leaves no room for a second model: first it writes, then it goes
            self._answer_missing("written", batches, sampling, 0, with_top_k=None)
            self._let_go()
        self._answer_missing("answers", batches, sampling, 0, with_top_k=top_k)
        read = range(len(batches)) if self._world.rank == 0 else range(0)
        return order, [self._partial.get("answers", number) for number in read]

    def _answer_missing(
        self,
        stage: str,
        batches: Sequence[Sequence[Sequence[int]]],
        sampling: Sampling,
        first: int,
        *,
        with_top_k: int | None,
    ) -> None:
        """Answer what is not answered yet, each rank its share, and wait for the other ranks.

        Args:
            first: number of the first batch.
            with_top_k: probabilities to store of each token; None: none, the text is all that counts.
        """
        numbers = range(first, first + len(batches))
        mine = [n for n in numbers if n % self._world.world_size == self._world.rank]
        if self._world.rank == 0 and (done := self._partial.done(stage, numbers)):
            say(self._console, f"continuing after {done} of {len(batches)} batches of {stage}")
        left = [n for n in mine if not self._partial.has(stage, n)]
        with CountProgress(self._console, stage, sum(len(batches[n - first]) for n in mine)) as progress:
            progress.advance(sum(len(batches[n - first]) for n in mine if n not in left))
            for number in left:
                prompts = batches[number - first]
                self._partial.put(stage, number, self._answer_batch(stage, prompts, sampling, number, with_top_k))
                progress.advance(len(prompts))
        self._world.barrier()

    def _answer_batch(
        self, stage: str, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int, with_top_k: int | None
    ) -> AnsweredBatch:
        if stage == "answers" and self._partial.has("written", number):
            answers: Sequence[Answer] = self._partial.get("written", number).answers
        else:
            generator = self._get_generator()
            if (
                with_top_k is not None
                and isinstance(generator, TransformersGenerator)
                and generator.gives_probabilities(sampling)
            ):
                answers, top_k, log_probs = generator.with_probabilities(prompts, sampling, number, with_top_k)
                return AnsweredBatch(tuple(answers), top_k, log_probs)
            answers = generator(prompts, sampling, number)
        if with_top_k is None:
            return AnsweredBatch(tuple(answers), no_tokens(0), torch.empty(0))
        pad = self._plan.base.tokenizer.pad_token_id if self._plan.base.tokenizer else 0
        top_k, log_probs = store_probabilities(self._get_model(), prompts, answers, with_top_k, pad)
        return AnsweredBatch(tuple(answers), top_k, log_probs)

    def _as_prompt(
        self, answer: Answer, number: int, account: ItemCounts, examples: dict[str, list[str]]
    ) -> Prompt | None:
        """What the model wrote, as a prompt; None where it is none."""
        plan = self._plan
        if plan.base.tokenizer is None:
            raise RuntimeError("a dry run writes no prompts")
        text = plan.base.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        reason = why_dropped(text, answer.ids, answer.ended, plan.config.rehearsal.max_repetition, "drop")
        if reason:
            note(account, examples, f"{NO_PROMPT}: {reason}", f"{WRITTEN}: {shortened(text)}")
            return None
        messages = [{"role": "user", "content": text}]
        try:
            room, positions = plan.sampling.max_new_tokens, plan.base.positions
            ids = encode_prompt(plan.base.tokenizer, messages, WRITTEN, room, positions, plan.opened)
        except BadItemError as error:
            note(account, examples, error.reason, str(error))
            return None
        return Prompt(tuple(messages), ids, f"{WRITTEN}, {number + 1}")

    def _get_model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = load_base(self._plan.config.model).to(device()).eval()
        return self._model

    def _get_generator(self) -> Generator:
        if self._generator is None:
            plan, model = self._plan, self._plan.config.model
            if plan.engine == "vllm":
                loaded = vllm_model(
                    model.name,
                    model.revision,
                    dtype=str(plan.made_of()["dtype"]),
                    max_length=plan.base.positions,
                    trust_remote_code=model.trust_remote_code,
                )
                self._generator = VllmGenerator(self._vllm.enter_context(loaded), plan.base.ends)
            else:
                pad = plan.base.tokenizer.pad_token_id if plan.base.tokenizer else 0
                self._generator = TransformersGenerator(self._get_model(), plan.base.ends, pad)
        return self._generator

    def _let_go(self) -> None:
        self._generator = None
        self._vllm.close()
