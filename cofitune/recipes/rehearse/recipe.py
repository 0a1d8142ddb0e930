"""`cofitune rehearse`: the base answers general prompts in its own words, before it is trained; written for later."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from cofitune.config.schema import Config
from cofitune.data.read import ItemCounts
from cofitune.data.top_k import TopK
from cofitune.distributed import check_agreement
from cofitune.errors import UserError
from cofitune.evaluation.data_parallel import BatchSharding, join
from cofitune.evaluation.out_of_memory import explaining_out_of_memory
from cofitune.files import exclusive, sha256_json
from cofitune.ranks import Rank, is_launched, this_rank
from cofitune.recipes.folders import check_disk_space, start_folder, versions_of_packages
from cofitune.recipes.on_plan import OnPlan
from cofitune.recipes.rehearse.plan import RehearsePlan, plan_rehearse, reasons_text
from cofitune.recipes.rehearse.plan_report import plan_facts, print_plan, print_result
from cofitune.recipes.rehearse.prompts import Prompt, note, shortened, text_of
from cofitune.recipes.rehearse.writer import Writer
from cofitune.rehearsal.filters import why_dropped
from cofitune.rehearsal.generate import (
    Answer,
)
from cofitune.rehearsal.items import RehearsalItem, read_rehearsal, write_rehearsal
from cofitune.rehearsal.partial import AnsweredBatch
from cofitune.reports.console import say
from cofitune.training.engine import start_distributed


def rehearse(
    config: Config,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    ranks: int = 1,
    on_plan: OnPlan | None = None,
) -> Path:
    """Have the base answer general prompts, and write prompts, answers and probabilities into `<output_dir>/rehearsal`.

    On several ranks each has the whole model and answers every `WORLD_SIZE`-th batch; rank 0 writes and talks. What
    was answered before an interruption is kept, and the result is the uninterrupted one's, bit for bit.

    Args:
        config: reads its sections model, data (the template) and rehearsal.
        overwrite: make a finished folder, or one of another config, again. What was interrupted on the way continues.
        dry_run: print the plan and its cost, and write nothing.
        console: where to talk; default: the terminal.
        ranks: ranks that a dry run plans for; a run counts its own.
        on_plan: is told of a dry run's plan.

    Returns:
        The folder with `items.jsonl`, `top_k.safetensors` and `manifest.json`.

    Raises:
        UserError: anything that the user can mend, found before weights load; or not one answer is worth keeping.
    """
    rank = this_rank() if is_launched() else Rank(world_size=ranks)
    console = (console or Console()) if rank.rank == 0 else Console(quiet=True)
    plan = plan_rehearse(config, overwrite, dry_run)
    if not dry_run and not overwrite and plan.manifest.is_file():
        read_rehearsal(plan.folder)  # a damaged one is not finished
        message = f"{plan.folder} is finished already, with this config and these prompts (--overwrite starts over)"
        say(console, message)
        return plan.folder
    print_plan(plan, rank.world_size, dry_run, console)
    if dry_run:
        if on_plan:
            on_plan(plan_facts(plan, rank.world_size))
        return plan.folder
    check_disk_space(plan.folder, plan.most_bytes)
    world = join(*start_distributed())
    plan = replace(plan, batch_size=world.broadcast(plan.batch_size))  # devices may differ, and batches must not
    # paths may be each machine's own
    check_agreement({**plan.made_of(), "base": None, "packages": versions_of_packages()}, world.group)
    with ExitStack() as lock:

        def start() -> None:
            lock.enter_context(exclusive(plan.folder, "rehearsal"))
            _start(plan, overwrite)

        world.run_on_rank_zero(start)
        doing = "the base answered", plan.batch_size
        dtype, again = str(plan.made_of()["dtype"]), "what was answered so far is answered again"
        with explaining_out_of_memory(lambda: doing, dtype, "rehearsal.batch_size", again):
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
    writer = Writer(plan, world, console)
    prompts = [*plan.prompts, *writer.write_prompts(account, examples)]
    if not prompts:
        raise UserError("rehearsal: the model wrote not one usable prompt; name general prompts in rehearsal.data")
    order, answered = writer.answer(prompts)
    if world.rank == 0:
        items, top_k, log_probs = _choose(plan, prompts, order, answered, account, examples)
        manifest = (
            plan.made_of()
            | plan.asked_under()
            | {
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
        )
        write_rehearsal(plan.folder, items, top_k, log_probs, manifest)
        plan.partial.remove()
        print_result(plan.folder, items, account, examples, console)
    world.barrier()  # a rank that ended earlier would have the launcher end the one that writes


def _choose(
    plan: RehearsePlan,
    prompts: Sequence[Prompt],
    order: Sequence[int],
    answered: Sequence[AnsweredBatch],
    account: ItemCounts,
    examples: dict[str, list[str]],
) -> tuple[list[RehearsalItem], TopK, Tensor]:
    """The answers that are worth learning again, in the prompts' order, with what is stored of them."""
    if plan.base.tokenizer is None:
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
        texts[index] = plan.base.tokenizer.decode(answer.ids, skip_special_tokens=True)
        reason = why_dropped(texts[index], answer.ids, answer.ended, requested.max_repetition, requested.unfinished)
        if reason:
            account.kept -= 1
            message = f"{prompt.where}: {shortened(text_of(prompt.messages))}: {shortened(texts[index])}"
            note(account, examples, reason, message)
            continue
        kept.append(index)
    if not kept:
        raise UserError(
            f"rehearsal: not one of {len(prompts):,} answers is worth keeping ({reasons_text(account)}): can this base "
            "answer in its template?"
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
