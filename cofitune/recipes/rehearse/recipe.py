"""`cofitune rehearse`: the base answers general prompts in its own words, before it is trained; written for later."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from cofitune.config.schema import Config
from cofitune.data.formats import BadItemError
from cofitune.data.read import ItemCounts
from cofitune.data.top_k import TopK
from cofitune.distributed import device
from cofitune.errors import UserError
from cofitune.evaluation.data_parallel import BatchSharding, in_batches, join
from cofitune.files import exclusive, sha256_json
from cofitune.ranks import Rank, is_launched, this_rank
from cofitune.recipes.folders import check_disk_space, start_folder
from cofitune.recipes.from_config import load_base
from cofitune.recipes.rehearse.plan import (
    TRIES,
    Prompt,
    RehearsePlan,
    encode_prompt,
    keep_prompt,
    make_plan,
    note,
    read_tests,
    shortened,
    text_of,
)
from cofitune.recipes.rehearse.plan_report import print_plan, print_result
from cofitune.rehearsal.filters import why_dropped
from cofitune.rehearsal.generate import (
    Answer,
    Generator,
    Sampling,
    TransformersGenerator,
    VllmGenerator,
    store_probabilities,
)
from cofitune.rehearsal.items import RehearsalItem, no_tokens, read_rehearsal, write_rehearsal
from cofitune.rehearsal.partial import AnsweredBatch, Partial
from cofitune.reports.console import say
from cofitune.reports.training.progress import CountProgress
from cofitune.training.engine import start_distributed

WRITTEN = "written by the model"
NO_PROMPT = "no prompt"  # what the model wrote as one
# a model's prompts must differ, so they are sampled, however its answers are made
PROMPT_TEMPERATURE, PROMPT_TOP_P, PROMPT_TOKENS = 1.0, 0.95, 96


def rehearse(
    config: Config,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    ranks: int = 1,
) -> Path:
    """Have the base answer general prompts, and write prompts, answers and probabilities into `<output_dir>/rehearsal`.

    On several ranks each has the whole model and answers every `WORLD_SIZE`-th batch; rank 0 writes and talks. What
    was answered before an interruption is kept, and the result is the uninterrupted one's, bit for bit.

    Args:
        config: reads its sections model, data (the template) and rehearsal.
        overwrite: make a finished folder, or one of another config, anew. What was interrupted on the way goes on.
        dry_run: print the plan and its cost, and write nothing.
        console: where to talk; default: the terminal.
        ranks: ranks that a dry run plans for; a run counts its own.

    Returns:
        The folder with `items.jsonl`, `top_k.safetensors` and `manifest.json`.

    Raises:
        UserError: anything that the user can mend, found before weights load; or not one answer is worth keeping.
    """
    rank = this_rank() if is_launched() else Rank(world_size=ranks)
    console = (console or Console()) if rank.rank == 0 else Console(quiet=True)
    plan = make_plan(config, overwrite, dry_run)
    if not dry_run and not overwrite and plan.manifest.is_file():
        read_rehearsal(plan.folder)  # a damaged one is not finished
        message = f"{plan.folder} is finished already, with this config and these prompts (--overwrite starts over)"
        say(console, message)
        return plan.folder
    print_plan(plan, rank.world_size, dry_run, console)
    if dry_run:
        return plan.folder
    check_disk_space(plan.folder, plan.most_bytes)
    world = join(*start_distributed())
    plan = replace(plan, batch_size=world.broadcast(plan.batch_size))  # devices may differ, and batches must not
    with ExitStack() as lock:
        if world.rank == 0:
            lock.enter_context(exclusive(plan.folder, "rehearsal"))
            _start(plan, overwrite)
        world.barrier()  # rank 0 has made the folder ready
        _rehearse(plan, world, console)
    return plan.folder


def _start(plan: RehearsePlan, overwrite: bool) -> None:
    """Make the folder ready: what was answered before by the same model from the same prompts stays."""
    partial, identity = plan.partial, plan.made_of()
    plan.manifest.unlink(missing_ok=True)  # what it marks as whole is about to be replaced
    start_folder(plan.config, plan.folder.name, overwrite and not partial.is_of(identity), resumes=True)
    partial.start(identity)


def _rehearse(plan: RehearsePlan, world: BatchSharding, console: Console) -> None:
    """Write prompts where the model is to, answer all prompts, and on rank 0 put the result together."""
    account, examples = ItemCounts(), {reason: list(some) for reason, some in plan.examples.items()}
    account.add(plan.account)
    writer = _Writer(plan, world, console)
    prompts = [*plan.prompts, *writer.write_prompts(account, examples)]
    if not prompts:
        raise UserError("rehearsal: the model wrote not one usable prompt; name general prompts in rehearsal.data")
    order, answered = writer.answer(prompts)
    if world.rank == 0:
        items, top_k, log_probs = _choose(plan, prompts, order, answered, account, examples)
        manifest = plan.made_of() | {
            "settings": plan.config.rehearsal.model_dump(mode="json"),
            "items": len(items),
            "held_out": sum(item.held_out for item in items),
            "unfinished": sum(not item.ended for item in items),
            "tokens": len(log_probs),
            "account": asdict(account),
            "examples": examples,
            "not_compared": list(plan.unread),
            "data": [source.identity() for source in plan.sources],
            "top_k": top_k.indices.shape[1],
        }
        write_rehearsal(plan.folder, items, top_k, log_probs, manifest)
        plan.partial.remove()
        print_result(plan.folder, items, account, examples, console)
    world.barrier()  # a rank that ended earlier would have the launcher end the one that writes


class _Writer:
    """Has the model write prompts and answers, batch by batch; this rank's share of them."""

    def __init__(self, plan: RehearsePlan, world: BatchSharding, console: Console) -> None:
        self._plan, self._world, self._console = plan, world, console
        self._partial: Partial = plan.partial
        self._model: PreTrainedModel | None = None
        self._generator: Generator | None = None

    def write_prompts(self, account: ItemCounts, examples: dict[str, list[str]]) -> list[Prompt]:
        """Prompts that the model writes itself, from where a user's turn opens.

        They are drawn in rounds of as many as are still wanted, and in all at most `TRIES` times as many.
        """
        plan, requested = self._plan, self._plan.config.rehearsal.self_prompted
        if not requested or plan.tokenizer is None:
            return []
        tests = read_tests(plan.config)
        seen = {prompt.ids for prompt in plan.prompts}
        sampling = Sampling(PROMPT_TOKENS, PROMPT_TEMPERATURE, PROMPT_TOP_P, plan.sampling.seed)
        results: list[Prompt] = []
        first, tried = 0, 0
        while len(results) < requested and tried < TRIES * requested:
            count = -(-(requested - len(results)) // plan.batch_size)
            batches = [[plan.opening] * plan.batch_size for _ in range(count)]
            for batch in self._batches("prompts", batches, sampling, first, with_top_k=None):
                for answer in batch.answers:
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
        """Answers to all prompts.

        Returns:
            The prompts' places in the order in which they were asked, the longest first; and the batches.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        batches = [[prompts[i].ids for i in part] for part in in_batches(order, self._plan.batch_size)]
        sampling, top_k = self._plan.sampling, self._plan.config.rehearsal.top_k
        if self._plan.engine == "vllm":  # which leaves no room for a second model: first it writes, then it goes
            self._batches("written", batches, sampling, 0, with_top_k=None)
            self._let_go()
        return order, self._batches("answers", batches, sampling, 0, with_top_k=top_k)

    def _batches(
        self, stage: str, batches: Sequence[Any], sampling: Sampling, first: int, *, with_top_k: int | None
    ) -> list[AnsweredBatch]:
        """Answer what is not answered yet, each rank its share, and read all of it.

        Args:
            first: number of the first batch.
            with_top_k: probabilities to store of each token; None: none, the text is all that counts.
        """
        numbers = range(first, first + len(batches))
        mine = [n for n in numbers if n % self._world.world_size == self._world.rank]
        done = self._partial.done(stage, numbers)
        if done and self._world.rank == 0:
            say(self._console, f"going on after {done} of {len(batches)} batches of {stage}")
        left = [n for n in mine if not self._partial.has(stage, n)]
        with CountProgress(self._console, stage, sum(len(batches[n - first]) for n in mine)) as progress:
            progress.advance(sum(len(batches[n - first]) for n in mine if n not in left))
            for number in left:
                prompts = batches[number - first]
                self._partial.put(stage, number, self._answer_batch(stage, prompts, sampling, number, with_top_k))
                progress.advance(len(prompts))
        self._world.barrier()
        return [self._partial.get(stage, number) for number in numbers]

    def _answer_batch(
        self, stage: str, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int, with_top_k: int | None
    ) -> AnsweredBatch:
        written = self._partial.has("written", number) and stage == "answers"
        answers = (
            self._partial.get("written", number).answers
            if written
            else self._get_generator()(prompts, sampling, number)
        )
        if with_top_k is None:
            return AnsweredBatch(tuple(answers), no_tokens(0), torch.empty(0))
        pad = self._plan.tokenizer.pad_token_id if self._plan.tokenizer else 0
        top_k, log_probs = store_probabilities(self._get_model(), prompts, answers, with_top_k, pad)
        return AnsweredBatch(tuple(answers), top_k, log_probs)

    def _as_prompt(
        self, answer: Answer, number: int, account: ItemCounts, examples: dict[str, list[str]]
    ) -> Prompt | None:
        """What the model wrote, as a prompt; None where it is none."""
        plan = self._plan
        if plan.tokenizer is None:
            raise RuntimeError("a dry run writes no prompts")
        text = plan.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        reason = why_dropped(text, answer.ids, answer.ended, plan.config.rehearsal.max_repetition, "drop")
        if reason:
            note(account, examples, f"{NO_PROMPT}: {reason}", f"{WRITTEN}: {shortened(text)}")
            return None
        messages = [{"role": "user", "content": text}]
        try:
            ids = encode_prompt(plan.tokenizer, messages, WRITTEN, plan.sampling.max_new_tokens, plan.positions)
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
                dtype = str(plan.made_of()["dtype"])
                self._generator = VllmGenerator(model.name, model.revision, dtype, plan.ends, plan.positions)
            else:
                pad = plan.tokenizer.pad_token_id if plan.tokenizer else 0
                self._generator = TransformersGenerator(self._get_model(), plan.ends, pad)
        return self._generator

    def _let_go(self) -> None:
        self._generator = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _choose(
    plan: RehearsePlan,
    prompts: Sequence[Prompt],
    order: Sequence[int],
    answered: Sequence[AnsweredBatch],
    account: ItemCounts,
    examples: dict[str, list[str]],
) -> tuple[list[RehearsalItem], TopK, Tensor]:
    """The answers that are worth learning again, in the prompts' order, with what is stored of them."""
    if plan.tokenizer is None:
        raise RuntimeError("a dry run chooses no answers")
    requested = plan.config.rehearsal
    rows: dict[int, tuple[Answer, TopK, Tensor]] = {}
    asked = iter(order)
    for batch in answered:
        start = 0
        for answer in batch.answers:
            part = slice(start, start + len(answer.ids))
            stored = TopK(batch.top_k.indices[part], batch.top_k.log_probs[part], batch.top_k.rest[part])
            rows[next(asked)] = answer, stored, batch.token_log_probs[part]
            start += len(answer.ids)
    kept: list[int] = []
    texts: dict[int, str] = {}
    for index, prompt in enumerate(prompts):
        answer = rows[index][0]
        texts[index] = plan.tokenizer.decode(answer.ids, skip_special_tokens=True)
        reason = why_dropped(texts[index], answer.ids, answer.ended, requested.max_repetition, requested.unfinished)
        if reason:
            account.kept -= 1
            message = f"{prompt.where}: {shortened(text_of(prompt.messages))}: {shortened(texts[index])}"
            note(account, examples, reason, message)
            continue
        kept.append(index)
    if not kept:
        raise UserError(
            f"rehearsal: not one of {len(prompts):,} answers is worth keeping ("
            + ", ".join(f"{count:,} × {reason}" for reason, count in account.reasons.items())
            + "): can this base answer in its template?"
        )
    held_out = _held_out([prompts[i] for i in kept], requested.held_out, requested.seed)
    items = [
        RehearsalItem(
            messages=prompts[i].messages,
            answer=texts[i],
            prompt_ids=prompts[i].ids,
            answer_ids=rows[i][0].ids,
            ended=rows[i][0].ended,
            held_out=place in held_out,
            where=prompts[i].where,
        )
        for place, i in enumerate(kept)
    ]
    account.supervised = sum(len(item.answer_ids) for item in items)
    return items, TopK.chain([rows[i][1] for i in kept]), torch.cat([rows[i][2] for i in kept])


def _held_out(prompts: Sequence[Prompt], share: float, seed: int) -> set[int]:
    """Places of the prompts that are held out: chosen by a hash, whatever stands before or behind them."""
    count = min(round(share * len(prompts)), len(prompts) - 1)
    if share and len(prompts) > 1:
        count = max(1, count)
    hashes = {place: sha256_json([seed, list(prompt.ids)]) for place, prompt in enumerate(prompts)}
    return set(sorted(hashes, key=lambda place: hashes[place])[:count])
