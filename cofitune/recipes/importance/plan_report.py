"""What `cofitune importance` would compute."""

from __future__ import annotations

from rich.console import Console

from cofitune.files import gib
from cofitune.importance_file import layer_units, unit_counts
from cofitune.ranks import Rank
from cofitune.recipes.importance.plan import ImportancePlan
from cofitune.recipes.on_plan import PlanFacts
from cofitune.reports.console import STOPPED, say
from cofitune.reports.figure import can_draw
from cofitune.reports.training.plan import print_account


def print_plan(plan: ImportancePlan, rank: Rank, console: Console) -> None:
    """Say what is estimated on what, how much work that is, which memory it takes and what is written."""
    anatomy = plan.anatomy
    say(console, f"importance of {anatomy.model_type}: {anatomy.num_layers} layers × units")
    for kind in unit_counts(anatomy, plan.axis):
        counts = layer_units(anatomy, kind)
        each = "–".join(f"{count:,}" for count in sorted({min(filter(None, counts)), max(counts)}))
        say(console, f"  {kind.replace('_', ' '):<16} {each:>7} a layer  {sum(counts):>10,} in all")
    longest = int(plan.examples.lengths.max())
    say(
        console,
        f"data     {plan.num_items:,} items, {plan.tokens:,} tokens (longest {longest:,}), template "
        f"{plan.template}\n"
        f"work     {len(plan.batches):,} micro-batches of {plan.batch_size} over {rank.world_size} rank(s), "
        f"{plan.passes} pass{'es' if plan.passes > 1 else ''} each",
    )
    sharding = plan.sharding
    say(console, f"sharding {'zero3' if sharding.sharded else 'none'}: {sharding.why}")
    parts = ", ".join(f"{name} {gib(size)}" for name, size in plan.memory.items())
    say(console, f"memory   about {gib(sum(plan.memory.values()))} on each device ({parts})")
    print_account(console, plan.account)
    pictures = ("importance.png", "importance.svg") if can_draw() else ()
    files = ("importance.safetensors", "scores.safetensors", "spread.csv", *pictures, "manifest.json", "config.yaml")
    say(console, f"writes   {plan.folder}/: {', '.join(files)}")
    say(console, STOPPED)
    if plan.interrupted:
        say(console, "continues from the sums of an interrupted computation")


def plan_facts(plan: ImportancePlan, rank: Rank) -> PlanFacts:
    """The plan in numbers."""
    return {
        "folder": str(plan.folder),
        "items": plan.num_items,
        "tokens": plan.tokens,
        "micro_batches": len(plan.batches),
        "passes": plan.passes,
        "ranks": rank.world_size,
        "sharded": plan.sharding.sharded,
        "device_bytes": sum(plan.memory.values()),
        "continues": plan.interrupted,
    }
