"""What an evaluation leaves: scores.json, the answers, the items that were lost and gained, and the table."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from cofitune.evaluation.samples import save_result
from cofitune.evaluation.statistics.comparison import Compared, build_scores, changed_items
from cofitune.files import write_checked_json, write_text
from cofitune.recipes.evaluate.plan import EvalPlan, Results
from cofitune.recipes.own_files import remove_samples
from cofitune.reports.console import say
from cofitune.reports.evaluation.scores import FORMAT, Scores
from cofitune.reports.evaluation.table import example_lines, sentences
from cofitune.reports.evaluation.turned import scores_tables

Changed = dict[str, dict[str, list[dict[str, object]]]]  # by model: lost and gained items


def make_scores(plan: EvalPlan, results: Results) -> dict[str, Any]:
    """The content of scores.json."""
    groups: dict[str, list[str]] = {}
    for model in plan.models:
        if model.training is not None:
            groups.setdefault(model.training, []).append(model.name)
    seeds = {m.name: m.seed for m in plan.models}
    by_seed = tuple(tuple(g) for g in groups.values() if len({seeds[name] for name in g}) > 1)
    full_sft = next((m.name for m in plan.models if m.role == "full_sft"), None)
    ordered = {m.name: {t.task.title: results[m.name][t.task.title] for t in plan.tasks} for m in plan.models}
    computed = build_scores(
        ordered, Compared(plan.models[0].name, full_sft, by_seed), plan.config.eval.speciality_weight
    )
    for model in plan.models:
        computed["models"][model.name] |= {
            "role": model.role,
            "path": model.path,
            **model.weights,
            "seed": model.seed,
        }
        if model.keep is not None:
            computed["models"][model.name] |= {"alpha": model.alpha, "keep": model.keep}
    return {"format": FORMAT, "settings": plan.settings, "tasks": plan.about_tasks} | computed


def score_changes(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each model's changes against the base by the score's name; a summary goes before a task of the same name."""
    base = next(iter(scores["models"]))
    own = [c for c in scores["comparisons"] if c["against"] == base]
    return {c["model"]: {**c["tasks"], **{n: v for n, v in c["summary"].items() if v is not None}} for c in own}


def write_result(plan: EvalPlan, results: Results, scores: dict[str, object], changed: Changed) -> None:
    """Answers, lost and gained items, then the scores: an interruption leaves no old scores beside new answers."""
    (plan.folder / "scores.json").unlink(missing_ok=True)
    remove_samples(plan.folder)
    for name, found in results.items():
        for title, result in found.items():
            save_result(result, plan.folder / "samples" / name / f"{title}.jsonl")
    for name, parts in changed.items():
        for what, items in parts.items():
            text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            write_text(plan.folder / "changed" / name / f"{what}.jsonl", text)
    write_checked_json(plan.folder / "scores.json", scores)


def find_changed(plan: EvalPlan, results: Results, scores: dict[str, Any]) -> Changed:
    """The items that each model lost and gained against the base."""
    choices = {t.task.title: [item.choices for item in t.items] for t in plan.tasks}
    own = [c for c in scores["comparisons"] if c["against"] == plan.models[0].name]
    return {c["model"]: changed_items(results, c, choices) for c in own}


def print_result(plan: EvalPlan, scores: dict[str, object], changed: Changed, console: Console) -> None:
    """Show the table, what stands out in it, and where everything lies."""
    told = Scores.of(scores)
    lines = list(sentences(told))
    if told.missing:
        lines.append(f"no task, and so in no mean: {', '.join(told.missing)}")
    for name, parts in changed.items():
        lines += example_lines(name, parts["lost"])
    if len(plan.models) == 1:
        lines.append(f"only the base was scored: {plan.folder.parent / 'train'} holds no finished training yet")
    lines.append(f"→ {plan.folder}/scores.json, samples/, changed/ (the items lost and gained)")
    for table in scores_tables(told, console.width):
        console.print(table)
    for line in lines:
        say(console, line)
