"""A training's plan on the terminal: what will train, on what, with which memory, and what it will write."""

from __future__ import annotations

import torch
from rich.console import Console

from cofitune.config.schema import DeepSpeed
from cofitune.files import gib
from cofitune.model.load import dtype_name
from cofitune.recipes.folders import free_bytes
from cofitune.recipes.on_plan import PlanFacts
from cofitune.recipes.train.data import print_data
from cofitune.recipes.train.plan import TrainPlan
from cofitune.reports.console import say
from cofitune.reports.training.plan import print_memory, print_region
from cofitune.training.peft import AdapterPlan, adapter_text

PACK_ATTENTION = {
    "varlen": "attention to packs: each conversation by itself (varlen)",
    "flash": "attention to packs: each conversation by itself (FlashAttention)",
    "mask": "attention to packs: of all pairs of a row's tokens, under a mask",
}


def print_plan(plan: TrainPlan, console: Console) -> None:
    """Say what will train, on what, with which memory, and what will be written."""
    config, world_size = plan.config, plan.steps.world_size
    if plan.adapter:
        _print_adapter(plan, plan.adapter, console)
    else:
        print_region(console, plan.region, plan.anatomy, plan.masked)
    for what, entry in plan.used.items():
        say(console, f"{what}: {entry['path']} (sha256 {entry['sha256'][:12]})")
    apply_to = config.softmask.apply_to if plan.masked else "none"
    control = f", control: {config.softmask.control}" if config.softmask.control != "none" and plan.masked else ""
    axis = ", along input columns" if config.softmask.axis == "columns" else ""
    masked = f" on {', '.join(plan.masked)}{axis}{control}" if plan.masked else ""
    say(console, f"soft mask: {apply_to}{masked}")
    if config.train.l2_to_base:
        say(console, f"pull towards the base: λ = {config.train.l2_to_base:g}, decoupled")
    _print_steps(plan, console)
    _print_rehearsal(plan, console)
    say(console, fitted_sentence(plan))
    print_stage_hint(config.deepspeed, world_size, torch.cuda.is_available(), console)
    _print_prefix(plan, console)
    print_memory(console, plan.footprint.memory, world_size)
    _print_conversion(plan, console)
    say(
        console,
        f"writes: {plan.folder}/ (delta.safetensors, manifest.json, metrics.jsonl, "
        f"config.yaml{', adapter/' if plan.adapter else ''})",
    )
    _print_disk(plan, console)
    say(console, "stopped: --resume continues from the newest checkpoint")
    for text in plan.notes:
        say(console, text)
    for text in plan.missing:
        say(console, ("still missing:", "yellow"), f" {text}")


def _print_conversion(plan: TrainPlan, console: Console) -> None:
    """Say where each rank makes a copy of the weights."""
    copies = plan.footprint.memory.host_loading // (plan.anatomy.num_parameters * plan.settings.dtype.itemsize)
    if copies > 1 and plan.stored:
        stored, trained = (dtype_name(d) for d in (plan.stored, plan.settings.dtype))
        say(
            console,
            f"  they are stored in {stored}: {copies} ranks convert a copy each; `cofitune convert "
            f"{plan.config.model.name} --to FOLDER --dtype {trained}` once, and they share the pages of one",
        )


def _print_adapter(plan: TrainPlan, adapter: AdapterPlan, console: Console) -> None:
    say(
        console,
        f"adapter: {adapter_text(adapter.as_dict())}\ntrainable parameters: ",
        (f"{adapter.num_parameters:,}", "bold"),
        f", all of them the adapter's; frozen: all {plan.anatomy.num_parameters:,} of the model's own",
    )


def _print_steps(plan: TrainPlan, console: Console) -> None:
    train, world_size = plan.config.train, plan.steps.world_size
    print_data(plan.data, console)
    what = "packs" if plan.data.packed_into else "items"
    if plan.pack_attention:
        say(console, PACK_ATTENTION[plan.pack_attention])
    say(
        console,
        "steps: ",
        (f"{plan.steps.num_steps:,}", "bold"),
        f" of {plan.steps.per_step} {what} ("
        f"{train.per_device_train_batch_size} × {train.gradient_accumulation_steps} accumulated × {world_size} "
        f"rank{'s' if world_size > 1 else ''}), lr {train.learning_rate:g} {train.lr_scheduler_type}, "
        f"ZeRO-{plan.settings.zero_stage}, {dtype_name(plan.settings.dtype)}",
    )


def _print_rehearsal(plan: TrainPlan, console: Console) -> None:
    train, rehearsal = plan.config.train, plan.rehearsal
    requested = train.rehearsal
    lines = []
    if requested and rehearsal:
        beside = plan.steps.rehearsal.beside(plan.steps.per_step) if plan.steps.rehearsal else 0
        what = "packs" if plan.data.packed_into else "items"
        cut = f", {rehearsal.account.truncated:,} cut at data.max_length" if rehearsal.account.truncated else ""
        dropped = "".join(f", {count:,} left out ({reason})" for reason, count in rehearsal.account.reasons.items())
        lines.append(
            f"rehearsal: {rehearsal.items:,} of the base's own answers, {beside} {what} beside the "
            f"{plan.steps.per_step} of each step, loss {requested.loss}, weight {requested.weight:g}{cut}{dropped}"
        )
    elif requested is None and plan.config.data.replay is None and plan.data.template == "chat":
        lines.append(
            "warning: no rehearsal: training a chat model on one task alone costs it instruction following; `cofitune "
            "rehearse` and train.rehearsal keep most of it (README, What keeps abilities)"
        )
    if rehearsal and rehearsal.held_out:
        limit = "" if train.max_drift is None else f", at most {train.max_drift:g} nats a token"
        held_out = rehearsal.held_out
        lines.append(
            f"drift: measured on {len(held_out.examples):,} held-out answers, {held_out.tokens:,} tokens{limit}"
        )
    for line in lines:
        say(console, line)


def fitted_sentence(plan: TrainPlan) -> str:
    """The ZeRO stage and the checkpointed layers, and which of them were chosen for the device."""
    train, deepspeed = plan.config.train, plan.config.deepspeed
    stage = f"ZeRO-{plan.settings.zero_stage}{' (auto)' if deepspeed.zero_stage == 'auto' else ''}"
    depth, first = plan.footprint.depth, plan.region.first
    count = plan.checkpointed
    layers = f"{count} (from layer {first} to {first + count - 1})" if count else "none"
    chosen = " (auto)" if train.gradient_checkpointing == "auto" else ""
    if plan.settings.hpz_ranks > 1:
        stage += f", weights once more on the {plan.settings.hpz_ranks} ranks of each node"
    return f"{stage}; gradient checkpointing{chosen}: {layers} of the {depth} layers in the backward pass"


def print_stage_hint(deepspeed: DeepSpeed, world_size: int, on_gpu: bool, console: Console) -> None:
    """Say where another ZeRO stage would train the same in less time."""
    if on_gpu and world_size == 1 and deepspeed.zero_stage == 3 and deepspeed.offload_param == "none":
        say(
            console,
            "hint: one device shares nothing under ZeRO-3, but fetches every module; deepspeed.zero_stage=2 trains the "
            "same and took 0.4 of the time at 7B (scripts/bench/gpu)",
        )


def _print_prefix(plan: TrainPlan, console: Console) -> None:
    kind, prefix = plan.config.train.prefix_cache, plan.prefix
    if kind == "none":
        return
    if plan.region.first == 0:
        message = "nothing to keep: the region starts at layer 0"
    elif plan.steps.num_epochs == 1:
        message = "nothing to keep: one pass over the data would reuse none of it"
    elif prefix is None or not prefix.lengths:
        message = f"{kind}; its size is known once the items can be counted in tokens"
    else:
        message = (
            f"{gib(prefix.num_bytes)} in {prefix.folder} ({sum(prefix.lengths):,} tokens × {prefix.hidden_size} × "
            f"{prefix.dtype.itemsize} bytes; {gib(prefix.free_bytes)} are free there)"
        )
    say(console, f"prefix cache: {message}")


def _print_disk(plan: TrainPlan, console: Console) -> None:
    train = plan.config.train
    checkpoints = (
        f"a checkpoint {gib(plan.checkpoint_bytes)}, every {train.save_steps} steps and at an epoch's end, of which "
        f"{train.save_total_limit} are kept"
        if train.save_steps
        else "no checkpoints"
    )
    say(
        console,
        f"disk: the delta {gib(plan.delta_bytes)}; {checkpoints}; {gib(free_bytes(plan.config.run))} are free there",
    )


def plan_facts(plan: TrainPlan) -> PlanFacts:
    """The plan in numbers: bytes, tokens, items, steps."""
    config = plan.config
    memory = plan.footprint.memory
    return {
        "folder": str(plan.folder),
        "base": config.model.name,
        "region": plan.region.to_dict(),
        "adapter": plan.adapter.as_dict() if plan.adapter else None,
        "masked": list(plan.masked),
        "trained_weights": plan.num_trained,
        "all_weights": plan.anatomy.num_parameters,
        "steps": plan.steps.num_steps,
        "items_a_step": plan.steps.per_step,
        "ranks": plan.steps.world_size,
        "learning_rate": config.train.learning_rate,
        **plan.resolved,
        "dtype": dtype_name(plan.settings.dtype),
        "items": len(plan.data.examples),
        "rehearsal_items": plan.rehearsal.items if plan.rehearsal else 0,
        "used": plan.used,
        "device_bytes": memory.device,
        "host_bytes": memory.host_loading + memory.host_offloaded,
        "delta_bytes": plan.delta_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "missing": list(plan.missing),
    }
