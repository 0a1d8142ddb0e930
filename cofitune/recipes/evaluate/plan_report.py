"""What `cofitune eval` would score."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cofitune.evaluation.batch_size import device_memory
from cofitune.recipes.evaluate.batches import AUTO, asking_memory, memory_lines
from cofitune.recipes.evaluate.plan import EvalPlan, Results
from cofitune.recipes.on_plan import PlanFacts
from cofitune.reports.console import plain_table, say, stopped


def print_plan(plan: EvalPlan, known: Results, console: Console, overwrite: bool = False) -> None:
    """Say what is asked of which model, what is known already, and what will be written."""
    table = plain_table()
    for name in ("category", "task", "kind", "metric"):
        table.add_column(name)
    for name in ("items", "longest prompt, tokens"):
        table.add_column(name, justify="right")
    for loaded in plan.tasks:
        task = loaded.task
        items, tokens = f"{len(loaded.items):,}", f"{loaded.longest:,}"
        table.add_row(*map(Text, (task.category, task.title, task.kind, loaded.metric.name, items, tokens)))
    console.print(table)
    tell_left_out(plan, console)
    models = plain_table()
    for name in ("model", "role", "path", "to score"):
        models.add_column(name, overflow="fold")
    for model in plan.models:
        missing = [t.task.title for t in plan.tasks if t.task.title not in known[model.name]]
        todo = "nothing: as scored before" if not missing else "all" if not known[model.name] else ", ".join(missing)
        models.add_row(*map(Text, (model.name, model.role or "", model.path, todo)))
    console.print(models)
    if plan.tasks:
        _print_asking(plan, console)
    say(
        console,
        f"writes   {plan.folder}/: scores.json, samples/<model>/<task>.jsonl, changed/<model>/, cache/, config.yaml\n"
        f"{stopped(overwrite)}",
    )
    for text in plan.missing:
        say(console, ("still missing:", "yellow"), f" {text}")


def _print_asking(plan: EvalPlan, console: Console) -> None:
    """Say how the tasks are asked, and what that takes of a device."""
    settings = plan.settings
    if plan.uses_vllm:
        say(
            console,
            f"asked    {plan.vllm_length} positions, {settings['dtype']} on {settings['device']} by vLLM "
            f"{settings['versions']['vllm']}, template {settings['template']}\n"
            "memory   vLLM takes 0.9 of each GPU; runs are merged one after the other, in a temporary folder as large "
            "as the model",
        )
        return
    needed = asking_memory(plan.config.model, plan.models, plan.tasks)
    memory = memory_lines(needed, device_memory(), plan.batch_sizes, settings["dtype"])
    say(
        console,
        f"asked    {plan.positions or 'unlimited'} positions, {settings['dtype']} on {settings['device']}, batches of "
        f"{_sizes(plan)}, template {settings['template']}\n" + "\n".join(memory),
    )


def _sizes(plan: EvalPlan) -> str:
    """Items a batch; where tasks differ, the least and the most."""
    least, most = min(plan.batch_sizes.values()), max(plan.batch_sizes.values())
    chosen = ", as fits" if plan.config.eval.batch_size == AUTO else ""
    return f"{least}{chosen}" if least == most else f"{least} to {most}{chosen}"


def tell_left_out(plan: EvalPlan, console: Console) -> None:
    """Say which items are asked of no model, which prompts the harness cuts, and which keys nothing reads.

    And which runs are asked under another date than they were trained under: all models are asked alike.
    """
    for model in plan.of_other_days:
        say(
            console,
            f"{model.name}: was trained under the date {model.day}, which the chat template writes, and all models are "
            f"asked under {plan.asked_day}; data.date={model.day} asks all under its day",
        )
    for loaded in plan.tasks:
        of = f"of {len(loaded.items) + len(loaded.left_out) + len(loaded.unusable)} items"
        for lines, what in (
            (loaded.unusable, "are left out; they cannot be asked or judged"),
            (loaded.left_out, f"are left out; with their answers they exceed the model's {plan.positions} positions"),
            (loaded.too_long, f"have no right answer within max_new_tokens: {loaded.task.max_new_tokens}"),
            (loaded.cut, f"exceed {plan.positions} positions, and the harness cuts their prompts from the left"),
        ):
            if lines:
                shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
                text = f"{loaded.task.title}: {len(lines)} {of} {what} (lines {shown})"
                say(console, text)
        if loaded.unread:
            say(console, loaded.about_unread)


def plan_facts(plan: EvalPlan, known: Results) -> PlanFacts:
    """The plan in numbers."""
    return {
        "folder": str(plan.folder),
        "tasks": {
            t.task.title: {
                "category": t.task.category,
                "metric": t.metric.name,
                "items": len(t.items),
                "batch_size": plan.batch_sizes[t.task.title],
            }
            for t in plan.tasks
        },
        "models": {
            m.name: {
                "path": m.path,
                **({"day": m.day} if m.day else {}),
                "to_score": [t.task.title for t in plan.tasks if t.task.title not in known[m.name]],
            }
            for m in plan.models
        },
        "missing": list(plan.missing),
    }
