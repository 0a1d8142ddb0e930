"""What `cofitune compare` would run, and how long that takes."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cofitune.files import gib
from cofitune.recipes.compare.plan import SCORED, ComparePlan, Run, required_disk_bytes
from cofitune.recipes.folders import free_bytes
from cofitune.recipes.on_plan import PlanFacts
from cofitune.reports.console import plain_table, say, stopped
from cofitune.reports.text import duration


def print_plan(
    plan: ComparePlan,
    seconds: dict[str, float],
    done: set[str],
    console: Console,
    overwrite: bool = False,
    is_auto: bool = False,
) -> None:
    """Say what is trained and scored, what of it is done, what it takes, and where it goes.

    Args:
        seconds: mean seconds that a finished run of each method took, training and evaluation.
        done: names of finished runs.
        is_auto: whether the config left the batches of the evaluation open.
    """
    table = plain_table()
    for name in ("method", "peak rates"):
        table.add_column(name, overflow="fold")
    for name in ("seeds", "steps a run", "trainable parameters", "runs", "done"):
        table.add_column(name, justify="right")
    for method in dict.fromkeys(run.method for run in plan.runs):
        own = [(r, t) for r, t in zip(plan.runs, plan.trainings, strict=True) if r.method == method]
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(r.learning_rate for r, _ in own))
        steps, trained = own[0][1].steps.num_steps, own[0][1].num_trained
        finished = sum(r.name in done for r, _ in own)
        table.add_row(
            Text(method), rates, str(len(plan.seeds)), f"{steps:,}", f"{trained:,}", str(len(own)), str(finished)
        )
    console.print(table)
    alphas = ", ".join(f"{alpha:g}" for alpha in plan.compare.alphas)
    models = 1 + len(plan.runs) * len(plan.compare.alphas)
    left = [run for run in plan.runs if run.name not in done]
    key = "eval.batch_size: auto, which is this in every comparison" if is_auto else "eval.batch_size"
    lines = [
        f"trains   {len(plan.runs)} runs, {sum(t.steps.num_steps for t in plan.trainings):,} optimizer steps; "
        f"{len(plan.runs) - len(left)} runs are done",
        f"scores   {models} models, the base and each run at alpha {alphas}, on {plan.items:,} items each, "
        f"{plan.config.eval.known_batch_size} at once ({key})",
        f"takes    {about(time_left(left, seconds))} more" if left else "takes    nothing more: every run is done",
        f"disk     {gib(required_disk_bytes(plan))} more, deltas and checkpoints; {gib(free_bytes(plan.folder))} free",
        f"against  {plan.compare.held_against}, at matched speciality",
        f"writes   {plan.folder}/: compare.json, frontier.png, frontier.svg, runs.jsonl, runs/, {SCORED}/",
        stopped(overwrite),
    ]
    for line in lines:
        say(console, line)
    for text in dict.fromkeys(text for t in plan.trainings for text in t.missing):
        say(console, ("still missing:", "yellow"), f" {text}")


def time_left(left: list[Run], seconds: dict[str, float]) -> float | None:
    """Seconds for these runs by what finished ones of their methods took, or of any; None where none has finished."""
    if not seconds:
        return None
    mean = sum(seconds.values()) / len(seconds)
    return sum(seconds.get(run.method, mean) for run in left)


def about(seconds: float | None) -> str:
    """A time in words."""
    if seconds is None:
        return "a time that the first finished run will tell"
    return f"about {duration(seconds)}"


def plan_facts(plan: ComparePlan, seconds: dict[str, float], done: set[str]) -> PlanFacts:
    """The plan in numbers; arguments as of `print_plan`."""
    return {
        "folder": str(plan.folder),
        "runs": {run.name: {"method": run.method, "done": run.name in done} for run in plan.runs},
        "steps": sum(t.steps.num_steps for t in plan.trainings),
        "alphas": list(plan.compare.alphas),
        "items": plan.items,
        "batch_size": plan.config.eval.known_batch_size,
        "seconds_left": time_left([run for run in plan.runs if run.name not in done], seconds),
        "more_bytes": required_disk_bytes(plan),
        "missing": list(dict.fromkeys(text for t in plan.trainings for text in t.missing)),
    }
