"""What `cofitune importance` would compute."""

from __future__ import annotations

from rich.console import Console

from cofitune.files import gib
from cofitune.importance_file import unit_counts
from cofitune.ranks import Rank
from cofitune.recipes.importance.plan import Plan
from cofitune.reports.figure import can_draw
from cofitune.reports.training.plan import print_account


def show_plan(plan: Plan, rank: Rank, console: Console) -> None:
    anatomy = plan.anatomy
    console.print(f"importance of {anatomy.model_type}: {anatomy.num_layers} layers × units", markup=False)
    for kind, units in unit_counts(anatomy).items():
        name = kind.replace("_", " ")
        console.print(f"  {name:<16} {units:>7,} a layer  {units * anatomy.num_layers:>10,} in all", highlight=False)
    longest = int(plan.examples.lengths.max())
    console.print(
        f"data     {len(plan.examples):,} items, {plan.tokens:,} tokens (longest {longest:,}), template "
        f"{plan.template}\n"
        f"work     {plan.num_micro_batches:,} micro-batches of {plan.batch_size} over {rank.world_size} rank(s), "
        f"{plan.passes} pass{'es' if plan.passes > 1 else ''} each",
        highlight=False,
    )
    sharding = plan.sharding
    console.print(f"sharding {'zero3' if sharding.sharded else 'none'}: {sharding.why}", highlight=False)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in plan.memory.items())
    console.print(f"memory   about {gib(sum(plan.memory.values()))} on each device ({parts})", highlight=False)
    print_account(console, plan.account)
    pictures = ("importance.png", "importance.svg") if can_draw() else ()
    files = ("importance.safetensors", "scores.safetensors", "spread.csv", *pictures, "manifest.json", "config.yaml")
    console.print(f"writes   {plan.folder}/: {', '.join(files)}", highlight=False, soft_wrap=True)
    if plan.interrupted:
        console.print("goes on  from the sums of an interrupted computation", highlight=False)
