"""`cofitune compare`: train methods × rates × seeds, score each at every alpha, and match them at equal speciality."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Protocol

from rich.console import Console

from cofitune.config.load import dump_config, overlay
from cofitune.config.schema import Config
from cofitune.errors import UserError, install
from cofitune.files import exclusive, read_json, write_checked_json, write_text
from cofitune.jsonl import append_line
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.compare.plan import FOLDER, ComparePlan, Run, model_name, plan_compare
from cofitune.recipes.compare.plan_report import about, plan_facts, print_plan, time_left
from cofitune.recipes.compare.result import build_comparison, finished_runs
from cofitune.recipes.compare.store import STORE, RunLine, mean_seconds, read_store
from cofitune.recipes.evaluate.batches import AUTO
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.folders import start_folder
from cofitune.recipes.on_plan import OnPlan
from cofitune.reports.compare.content import Comparison
from cofitune.reports.compare.plot import methods_picture
from cofitune.reports.compare.table import comparison_tables, sentences
from cofitune.reports.console import say
from cofitune.reports.figure import can_draw, write_picture
from cofitune.search.winner import read_winner


class RunCommand(Protocol):
    """How a cofitune command is typed in fresh processes: starting ranks belongs to the launcher above."""

    def __call__(self, arguments: list[str], log: Path) -> str | None:
        """Run `cofitune <arguments>` and wait; None, or in one line why it failed. What it says goes into `log`."""


def compare(
    config: Config,
    *,
    run_command: RunCommand,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    ranks: int = 1,
    on_plan: OnPlan | None = None,
) -> Path:
    """Train and score what the section `compare` names, into `<output_dir>/compare`.

    Every run is a run like any other, in a folder of its own; one that has finished is not trained again, one that was
    interrupted continues, and one that failed is tried again by the next call. The base is scored once.

    Args:
        run_command: runs `cofitune train` and `cofitune eval`.
        ranks: on how many ranks it trains.
        on_plan: is told of a dry run's plan.

    Returns:
        The folder with compare.json, frontier.png and .svg, runs.jsonl and runs/.

    Raises:
        UserError: anything that the user can mend, found before the first training; or no run has finished.
    """
    console = console or Console()
    plan = plan_compare(resolve_search(config), overwrite, dry_run, ranks)
    known = {} if overwrite else read_store(plan)
    done = {name for name, line in known.items() if line["status"] == "done"}
    print_plan(plan, mean_seconds(known), done, console, overwrite, config.eval.batch_size == AUTO)
    if dry_run:
        if on_plan:
            on_plan(plan_facts(plan, mean_seconds(known), done))
        return plan.folder
    with exclusive(plan.folder, "comparison"):
        start_folder(config.model_copy(update={"eval": plan.config.eval}), FOLDER, overwrite)
        _hand_on_answers(config.run / "eval" / "cache", plan.cache)
        lines = _run_all(plan, known, run_command, console)
        if not finished_runs(plan, lines):
            raise UserError(
                "compare: no run has finished, so that there is nothing to compare; the first: "
                + next(f"{line['run']}: {line['reason']}" for line in lines.values())
            )
        content = build_comparison(plan, lines)
        write_checked_json(plan.folder / "compare.json", content)
    compared = Comparison.of(content)
    for table in comparison_tables(compared):
        console.print(table)
    for line in sentences(compared):
        say(console, line)
    if can_draw():
        write_picture(plan.folder, methods_picture("frontier", compared))
    else:
        say(console, f"no picture: matplotlib is not installed ({install('plots')})")
    say(console, f"→ {plan.folder}/compare.json, frontier.png, frontier.svg")
    return plan.folder


def _run_all(
    plan: ComparePlan, known: dict[str, RunLine], run_command: RunCommand, console: Console
) -> dict[str, RunLine]:
    """Train and score every run that is not done; returns each run's last line of the store."""
    lines, began = dict(known), time.monotonic()
    lacking = _lacking_answers(plan, [run for run in plan.runs if run.is_trained])
    waiting = [run for run in plan.runs if run.name in lacking or run not in finished_runs(plan, lines)]
    scored = {run.name for run in waiting if run.is_trained and run.name not in lacking}
    waiting.sort(key=lambda run: run.name not in scored)  # they cost nothing: no budget shall leave them out
    budget = plan.compare.budget_hours
    for number, run in enumerate(waiting):
        expected = time_left([run], mean_seconds(lines)) or 0.0
        over = budget is not None and time.monotonic() - began + expected > budget * 3600
        if number and run.name not in scored and over:
            say(console, f"budget_hours: {budget:g} leave no time for {run.name}")
            break
        line = _run_one(plan, run, run.name in scored, run_command, lines.get(run.name))
        lines[run.name] = line
        append_line(plan.folder / STORE, json.dumps(line, ensure_ascii=False))
        left = about(time_left(waiting[number + 1 :], mean_seconds(lines)))
        message = line["reason"] or ", ".join(f"{what} {value:.0f} s" for what, value in line["seconds"].items())
        say(
            console,
            f"{len(plan.runs) - len(waiting) + number + 1}/{len(plan.runs)} {run.name}: {line['status']}, {message}; "
            + (f"{left} left" if number + 1 < len(waiting) else "the last"),
        )
    return lines


def _run_one(plan: ComparePlan, run: Run, is_scored: bool, run_command: RunCommand, before: RunLine | None) -> RunLine:
    """Train a run, from its checkpoint on if it has one, and score it at every alpha; its line of the store.

    A run that is trained is only scored, and that only where answers lack; the time that its training took is what its
    line `before` says.
    """
    asked, scored = run.folder / "asked.yaml", run.folder / "scored.yaml"
    write_text(asked, dump_config(run.config))
    write_text(scored, dump_config(plan.eval_config([run])))
    seconds: dict[str, float] = {}
    commands = {"train": ["train", str(asked), "--resume"], "evaluate": ["eval", str(scored)]}
    if run.is_trained:
        del commands["train"]
        seconds["train"] = _seconds_of_training(run, before)
    if is_scored:
        del commands["evaluate"]
    reason = None
    for what, words in commands.items():
        started = time.perf_counter()
        reason = run_command(words, run.folder / f"{what}.log")
        seconds[what] = round(time.perf_counter() - started, 1)
        if reason is not None:
            reason = f"{what}: {reason}"
            break
    return {
        "run": run.name,
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "identity": run.identity,
        "status": "done" if reason is None else "failed",
        "reason": reason,
        "seconds": seconds,
    }


def _seconds_of_training(run: Run, before: RunLine | None) -> float:
    """Of a trained run by its line, or where a killed comparison left none by what the training says of itself."""
    known = before["seconds"].get("train") if before else None
    manifest = run.folder / "train" / "manifest.json"
    return float(read_json(manifest, "training manifest")["seconds"] if known is None else known)


def _lacking_answers(plan: ComparePlan, trained: list[Run]) -> set[str]:
    """Of trained runs, those that some task has not been asked of at some alpha."""
    if not trained:
        return set()
    answers = plan_eval(plan.eval_config(trained))
    known = answers.known()
    alphas = plan.compare.alphas
    return {
        run.name for run in trained if any(len(known[model_name(run.name, a)]) < len(answers.tasks) for a in alphas)
    }


def _hand_on_answers(result: Path, cache: Path) -> None:
    """Take over what `cofitune eval` has asked the base already; answers are kept by all that they depend on."""
    for entry in result.iterdir() if result.is_dir() else ():
        if entry.is_dir() and not (cache / entry.name).exists():
            shutil.copytree(entry, cache / entry.name)


def resolve_search(config: Config) -> Config:
    """Where the config trains the region that its search found, name that region: a run has no search of its own.

    Raises:
        ArtifactError: there is none, or it was found on another base.
    """
    if config.region != "search":
        return config
    layers, modules = read_winner(config.run / "search", fingerprint(config.model.name, config.model.revision))
    changes = {"region": {"layers": layers, "modules": list(modules)}}
    return overlay(config, changes, "region: search", {})
