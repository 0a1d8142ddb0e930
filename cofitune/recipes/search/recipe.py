"""`cofitune search`: try regions level by level, each by a short training and a small evaluation; write the winner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cofitune.config.schema import Config
from cofitune.files import exclusive, write_checked_json
from cofitune.recipes.folders import start_folder
from cofitune.recipes.on_plan import OnPlan, PlanFacts
from cofitune.recipes.search.cost import Measure, cost_lines
from cofitune.recipes.search.plan import SearchPlan, plan_search
from cofitune.recipes.search.proxy import Proxy, StartProxy, make_proxy
from cofitune.recipes.search.repeats import Decision, Repeats, decide, repeat_leaders
from cofitune.recipes.search.result import Result, make_result, row_of
from cofitune.recipes.search.trials import Trials
from cofitune.recipes.trial.executor import TrialExecutor
from cofitune.reports import figure
from cofitune.reports.console import say, stopped
from cofitune.reports.search.live import Lines, SearchLive, Watcher
from cofitune.reports.search.plot import search_picture
from cofitune.reports.search.row import Row
from cofitune.reports.search.tree import PlanRow, plan_report, search_report
from cofitune.search import tree
from cofitune.search.budget import Budget
from cofitune.search.equal_loss import EqualLoss
from cofitune.search.level import Job, SearchSettings
from cofitune.search.objective import Objective
from cofitune.search.store import open_store
from cofitune.search.trial import Trial
from cofitune.search.winner import write_winner


def search(
    config: Config,
    *,
    execute: TrialExecutor,
    start_proxy: StartProxy,
    measure: Measure,
    at_once: int | None = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    watcher: Watcher | None = None,
    ranks: int = 1,
    on_plan: OnPlan | None = None,
) -> Path:
    """Search for the region to train and write it into `<output_dir>/search/region.yaml`.

    Every finished trial is kept: a call that was killed continues where it was, and one that was finished only prints.

    Args:
        config: reads its sections model, data, train, deepspeed, eval and search; for a proxy, importance.
        execute: runs trials, in processes that the launcher above starts.
        start_proxy: takes the gradient statistics of a proxy, likewise.
        measure: takes the time of a few steps and items, for a dry run.
        at_once: how many trials `execute` runs at a time; None: nobody knows. It decides how closely a budget in
            hours is watched.
        overwrite: forget all trials and begin again.
        dry_run: print the levels and what they cost, and write nothing.
        console: where to talk; default: the terminal.
        on_plan: is told of a dry run's plan.
        watcher: who is told of every trial; default: a tree that lives on a terminal, else a line each.
        ranks: on how many ranks a trial trains. The batch grows with them, so trials on another number of ranks are not
            comparable, and a store of such trials is refused.

    Returns:
        The folder with `trials.jsonl`, `tree.json`, `region.yaml` and, with the extra `plots`, `search.png` and `.svg`.

    Raises:
        UserError: anything that the user can mend, found before the first trial; or not one trial finished.
    """
    console = console or Console()
    plan = plan_search(config, overwrite, dry_run, ranks)
    for note in plan.notes:
        say(console, f"note: {note}")
    if dry_run:
        proxy_ranks = ranks if at_once is not None else 1  # a cluster's proxy is taken here, in one process
        costs = _print_plan(plan, overwrite, measure, console, proxy_ranks)
        if on_plan:
            on_plan(_plan_facts(plan, costs, ranks))
        return plan.folder
    with exclusive(plan.folder, "search"):
        start_folder(config, "search", overwrite)
        trials = Trials(plan, open_store(plan.folder, plan.identity, repair=True), execute)
        proxy = make_proxy(plan, start_proxy)
        say(console, stopped(overwrite))
        with _watched(watcher, console, plan.at_most, at_once) as watching:
            base = _score_base(trials, console)
            decision = _search(plan, _rules(plan, base, trials, proxy, at_once), trials, watching, base)
        _conclude(plan, decision.result.winner, make_result(plan, decision, trials, proxy), console)
    return plan.folder


def _conclude(plan: SearchPlan, winner: Trial, result: Result, console: Console) -> None:
    """Write tree.json, the winner's region.yaml and the plot, and show the tree."""
    write_checked_json(plan.folder / "tree.json", result.tree)
    path = write_winner(plan.folder, winner, " ".join(result.sentences), plan.identity["model"]["fingerprint"])
    if figure.can_draw():
        figure.write_picture(plan.folder, search_picture("search", result.tree))
    console.print(search_report(result.base, result.rows, winner.id, result.sentences), crop=False)
    say(console, f"{path}: `region: search` in this config trains it")


@contextmanager
def _watched(watcher: Watcher | None, console: Console, at_most: int, at_once: int | None) -> Iterator[Watcher]:
    """Who is told of the trials; a tree on the terminal is there as long as the context."""
    if watcher is not None or not console.is_terminal:
        yield watcher or Lines(console, at_most)
        return
    with SearchLive(console, at_most, at_once) as live:
        yield live


def _score_base(trials: Trials, console: Console) -> Trial:
    if not trials.knows_base:
        say(console, "scoring the base, which trains nothing")
    return trials.score_base()


def _search(plan: SearchPlan, rules: SearchSettings, trials: Trials, watcher: Watcher, base: Trial) -> Decision:
    """Walk the tree, and train its leaders with further seeds where that is asked for.

    Whoever watches is told, and the weights of what goes no further are dropped.
    """
    store = trials.store
    watcher.on_base(row_of(base, store))
    finished: list[Trial] = []
    first_seed = plan.config.train.seed

    def run_jobs(jobs: Sequence[Job]) -> Iterator[Trial]:
        watcher.on_start([_waiting(job, plan) for job in jobs])
        return trials.run(jobs)

    def tell(trial: Trial, known: bool) -> None:
        if trial.done and trial.seed == first_seed:
            finished.append(trial)
        if trial.status != "paused":
            trials.drop_weights(trial.id)  # also of one that is known: what killed the search may have come between
        best = rules.objective.order(finished)[0].id if finished else None
        seed = None if trial.seed == first_seed else trial.seed
        watcher.on_outcome(replace(row_of(trial, store), seed=seed), known, best)

    def expect(number: int, reached: int) -> None:
        watcher.on_level(reached + sum(level.most for level in plan.planned[number:]) + plan.most_repeats)

    result = tree.search(
        plan.root, plan.levels, rules=rules, run_jobs=run_jobs, store=store, on_trial=tell, on_level=expect
    )
    repeats = repeat_leaders(plan, rules, result, run_jobs, store, tell) if plan.most_repeats else Repeats()
    return decide(plan, rules.objective, result, repeats)


def _rules(plan: SearchPlan, base: Trial, trials: Trials, proxy: Proxy | None, at_once: int | None) -> SearchSettings:
    """What the section `search` says, in the search's own words."""
    requested = plan.config.search
    by_loss = plan.measure.kind == "loss"
    return SearchSettings(
        steps=requested.train_steps,
        beam=requested.beam,
        objective=EqualLoss(base, requested.reach, requested.tolerance)
        if by_loss
        else Objective(requested.objective, requested.floor, base),
        rungs=plan.rungs,
        compare=trials.compare,
        budget=Budget(requested.budget_hours, requested.budget_trials, at_once),
        proxy_score=proxy.proxy_score if proxy else None,
        keep=requested.proxy_keep if requested.proxy == "prune" else 1.0,
    )


def _waiting(job: Job, plan: SearchPlan) -> Row:
    weights = job.region.num_parameters(plan.anatomy)
    return Row(job.id, job.parent, job.region, job.level, weights, None, None, None, 0.0, seed=job.seed)


def _print_plan(plan: SearchPlan, overwrite: bool, measure: Measure, console: Console, proxy_ranks: int) -> list[str]:
    """Print the levels and the cost, whose sentences are returned."""
    store = open_store(plan.folder, plan.identity) if plan.has_store and not overwrite and not plan.missing else None
    num_done = sum(trial.done and trial.region is not None for trial in store.trials()) if store else 0
    rows = [PlanRow(str(p.level), p.candidates, p.most, p.exact) for p in plan.planned]
    costs = cost_lines(plan, store, measure, proxy_ranks)
    console.print(plan_report(rows, plan.config.search.train_steps, num_done, costs))
    for text in plan.missing:
        say(console, f"still missing: {text}")
    return costs


def _plan_facts(plan: SearchPlan, costs: Sequence[str], ranks: int) -> PlanFacts:
    levels = [{"tries": str(p.level), "trials": p.most, "exact": p.exact} for p in plan.planned]
    return {
        "folder": str(plan.folder),
        "ranks": ranks,
        "levels": levels,
        "most_trials": plan.at_most,
        "train_steps": plan.config.search.train_steps,
        "costs": list(costs),
        "missing": list(plan.missing),
    }
