"""`compare.json`: the points of each method, its frontier, and the methods at matched speciality."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from cofitune.evaluation.statistics.comparison import match_items
from cofitune.evaluation.statistics.matched import Point, match_methods
from cofitune.evaluation.statistics.paired import CONFIDENCE, DRAWS, SEED, Bootstrap
from cofitune.files import read_json
from cofitune.recipes.compare.plan import ComparePlan, Run, model_name
from cofitune.recipes.compare.store import RunLine
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.evaluate.recipe import evaluate
from cofitune.recipes.folders import environment
from cofitune.reports.compare.content import FORMAT


def build_comparison(plan: ComparePlan, lines: Mapping[str, RunLine]) -> dict[str, object]:
    """The content of compare.json, and beside it the evaluation of all of its models."""
    done = finished_runs(plan, lines)
    evaluation = plan.eval_config(done)
    evaluate(evaluation, console=Console(quiet=True))  # all is known by now: no weights load
    answers = plan_eval(evaluation)
    results = answers.known()
    bootstrap = Bootstrap(match_items(results), plan.config.eval.speciality_weight)
    places = {name: index for index, name in enumerate(results)}
    seeds = _whole_seeds(plan, lines)
    methods = {method: _points(plan, method, seeds, done, places) for method in plan.compare.methods}
    missing = [run.name for run in plan.runs if run not in done]
    return {
        "format": FORMAT,
        "reference": plan.compare.held_against,
        "partial": {"runs": len(plan.runs), "done": len(done), "missing": missing} if missing else None,
        "seeds": seeds,
        "alphas": list(plan.compare.alphas),
        "methods": {m: _about_method(plan, m) for m in plan.compare.methods},
        **match_methods(bootstrap, methods, plan.compare.held_against, *_masked_and_controls(plan)),
        "runs": [_about_run(run, lines[run.name]) for run in plan.runs if run.name in lines],
        "tasks": answers.about_tasks,
        "intervals": {
            "confidence": CONFIDENCE,
            "method": "paired bootstrap over items, stratified by task, two coin items a task, percentiles"
            + ("; seeds resampled alike for all methods" if len(seeds) > 1 else "; one seed: over items alone"),
            "draws": DRAWS,
            "seed": SEED,
        },
        "settings": answers.settings,
        "config": plan.config.model_dump(mode="json"),
        "made_with": environment(),
    }


def finished_runs(plan: ComparePlan, lines: Mapping[str, RunLine]) -> list[Run]:
    """The runs that are done, in the plan's order."""
    return [run for run in plan.runs if run.name in lines and lines[run.name]["status"] == "done"]


def _whole_seeds(plan: ComparePlan, lines: Mapping[str, RunLine]) -> list[int]:
    """The seeds of which every run was tried; without one, the first: means over unlike seeds are no equals."""
    whole = [seed for seed in plan.seeds if all(run.name in lines for run in plan.runs if run.seed == seed)]
    return whole or [plan.seeds[0]]


def _points(plan: ComparePlan, method: str, seeds: list[int], done: list[Run], places: dict[str, int]) -> list[Point]:
    """A method's rates × alphas, as far as all of these seeds have finished."""
    results = []
    for rate in dict.fromkeys(run.learning_rate for run in plan.runs if run.method == method):
        runs = [run for run in done if (run.method, run.learning_rate) == (method, rate) and run.seed in seeds]
        if len(runs) == len(seeds):
            for alpha in plan.compare.alphas:
                models = tuple(places[model_name(run.name, alpha)] for run in runs)
                results.append(Point(model_name(runs[0].setting, alpha), rate, alpha, models))
    return results


def _masked_and_controls(plan: ComparePlan) -> tuple[list[str], list[str]]:
    """The methods under the soft mask, and those under one of its controls."""
    masks = {run.method: run.config.softmask for run in plan.runs}
    masked = [m for m, mask in masks.items() if mask.apply_to != "none" and mask.control == "none"]
    return masked, [m for m, mask in masks.items() if mask.control != "none"]


def _about_method(plan: ComparePlan, method: str) -> dict[str, object]:
    """What a method trains, by its first run."""
    run, training = next((r, t) for r, t in zip(plan.runs, plan.trainings, strict=True) if r.method == method)
    sections = ("region", "adapter", "softmask")
    return {
        "trained_weights": training.num_trained,
        "all_weights": training.anatomy.num_parameters,
        "steps": training.steps.num_steps,
        **run.config.model_dump(mode="json", include=set(sections)),
        "l2_to_base": run.config.train.l2_to_base,
        "replay": run.config.data.replay.share if run.config.data.replay else 0.0,
    }


def _about_run(run: Run, line: RunLine) -> dict[str, object]:
    results = {**line, "folder": str(run.folder)}
    if run.is_trained:
        manifest = read_json(run.folder / "train" / "manifest.json", "training manifest")
        kept = ("first_loss", "last_loss", "tokens", "delta_sha256")
        results |= {name: manifest[name] for name in kept} | {"training_seconds": manifest["seconds"]}
    return results
