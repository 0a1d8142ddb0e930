"""A rehearsal on the terminal: its plan and cost, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cofitune.data.read import ItemCounts
from cofitune.files import gib
from cofitune.recipes.folders import free_bytes
from cofitune.recipes.on_plan import PlanFacts
from cofitune.recipes.rehearse.plan import RehearsePlan
from cofitune.rehearsal.items import RehearsalItem
from cofitune.reports.console import STOPPED, say


def print_plan(plan: RehearsePlan, ranks: int, dry_run: bool, console: Console) -> None:
    """Say what the base is asked, how it answers, what that costs at most, and what is written."""
    requested = plan.config.rehearsal
    own = f" and {requested.self_prompted:,} that the model writes" if requested.self_prompted else ""
    how = f"temperature {requested.temperature:g}, top_p {requested.top_p:g}" if requested.temperature else "greedy"
    tokens = plan.account.tokens
    read = f"{tokens:,} tokens" if plan.base.tokenizer else "tokens not counted without a tokenizer"
    flops = 2 * plan.base.anatomy.num_parameters * (tokens + 2 * plan.most_tokens)
    lines = [
        f"prompts  {len(plan.prompts):,} of {plan.account.read:,} rows{own}, {read}, template {plan.base.template}",
        f"answers  {how}, at most {requested.max_new_tokens} tokens each, by {plan.engine}, {plan.batch_size} prompts "
        f"a batch, {ranks} rank{'s' if ranks > 1 else ''}",
        f"cost     at most {plan.most_tokens:,} tokens to generate, {flops / 1e12:,.0f} TFLOPs; the first batch tells "
        "the time",
        f"disk     at most {gib(plan.most_bytes)} ({requested.top_k} probabilities a token); "
        f"{gib(free_bytes(plan.folder))} are free there",
        f"writes   {plan.folder}/: items.jsonl, top_k.safetensors, manifest.json, config.yaml",
        STOPPED,
    ]
    for line in lines:
        say(console, line)
    if dry_run:  # else the result tells it, together with what was left out of the answers
        _print_left_out(plan.account, plan.examples, console)
    if plan.unread:
        say(
            console,
            f"not compared with the prompts: the items of {', '.join(plan.unread)} (lm-evaluation-harness's own)",
        )
    for text in plan.base.missing:
        say(console, ("still missing:", "yellow"), f" {text}")


def print_result(
    folder: Path,
    items: Sequence[RehearsalItem],
    account: ItemCounts,
    examples: Mapping[str, Sequence[str]],
    console: Console,
) -> None:
    """Say how many answers there are, and what was left out and why."""
    _print_left_out(account, examples, console)
    unfinished = sum(not item.ended for item in items)
    held_out = sum(item.held_out for item in items)
    cut = f"; {unfinished:,} reached max_new_tokens and are trained on without an end of turn" if unfinished else ""
    lines = [
        f"{len(items):,} answers, {account.supervised:,} tokens{cut}",
        f"{held_out:,} of them are held out: never trained on, drift is measured on them"
        if held_out
        else "none is held out, so drift cannot be measured on them (rehearsal.held_out)",
        f"→ {folder}",
    ]
    for line in lines:
        say(console, line)


def _print_left_out(account: ItemCounts, examples: Mapping[str, Sequence[str]], console: Console) -> None:
    for reason, count in account.reasons.items():
        say(console, f"left out: {count:,} × {reason}")
        for message in examples.get(reason, ())[:2]:
            say(console, f"    {message}")


def plan_facts(plan: RehearsePlan, ranks: int) -> PlanFacts:
    """The plan in numbers."""
    return {
        "folder": str(plan.folder),
        "prompts": len(plan.prompts),
        "self_prompted": plan.config.rehearsal.self_prompted,
        "most_tokens": plan.most_tokens,
        "most_bytes": plan.most_bytes,
        "engine": plan.engine,
        "batch_size": plan.batch_size,
        "ranks": ranks,
        "left_out": dict(plan.account.reasons),
        "missing": list(plan.base.missing),
    }
