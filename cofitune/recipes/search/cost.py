"""What a search will take, before it begins: by the trials that are in its store, or by a few measured steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cofitune.config.schema import Search
from cofitune.errors import UserError
from cofitune.files import gib
from cofitune.recipes.search.gradient_statistics import ITEMS
from cofitune.recipes.search.plan import SearchPlan
from cofitune.recipes.search.proxy import known_statistics
from cofitune.recipes.search.trial_config import trial_config
from cofitune.recipes.trial.executor import Measured, TrialRequest
from cofitune.reports.text import duration, many, region_text
from cofitune.search.budget import Expected
from cofitune.search.halving import SuccessiveHalving
from cofitune.search.store import Store
from cofitune.search.trial import BASE

MEASURED = "measured"  # the trial that nobody keeps
Measure = Callable[[TrialRequest], Measured]  # takes a few steps of a trial, and writes nothing


@dataclass(frozen=True)
class Work:
    """How many optimizer steps, in how many parts of trials, each followed by an evaluation."""

    steps: int
    parts: int


def cost_lines(plan: SearchPlan, store: Store | None, measure: Measure, proxy_ranks: int = 1) -> list[str]:
    """What the whole search takes, with and without halving, a sentence a line; and what its prefix cache takes.

    Args:
        store: of an earlier call, if there is one.
        proxy_ranks: on how many the proxy's pass is made.
    """
    lines = _prefix_lines(plan)
    if plan.missing:
        return ["The time is not known: a step can be measured when nothing is missing.", *lines]
    expected = Expected.of(store) if store else None
    base_seconds = store.seconds(BASE) if store and expected else 0.0
    if expected:
        source = "by the mean of the trials in the store"
    else:
        folder = plan.folder / "trials" / MEASURED
        try:
            measured = measure(TrialRequest(MEASURED, trial_config(plan, plan.largest, folder), folder))
        except UserError as error:
            return [f"The time is not known: {error}", *lines]
        expected = Expected(measured.seconds_a_step, measured.seconds_to_evaluate)
        base_seconds = measured.seconds_to_start + measured.seconds_to_evaluate
        source = f"measured on {region_text(plan.largest)}, the largest region: the others take less"
    proxy_lines, proxy_seconds = _proxy(plan, store is not None, expected.a_step, proxy_ranks)
    about = "about" if all(level.exact for level in plan.planned) else "at most about"
    what = "measuring" if plan.measure.kind == "loss" else "an evaluation"
    lines.insert(0, f"A step takes {expected.a_step:.2f} s, {what} {duration(expected.besides)} ({source}).")
    rungs = plan.rungs
    thinned = rungs or _usual_rungs(plan.config.search)
    plain, halved = (
        base_seconds + proxy_seconds + expected.seconds(w.steps, w.parts)
        for w in (_work(plan, None), _work(plan, thinned))
    )
    message = f"{about} {duration(plain)} without halving"
    if thinned:
        how = "" if rungs else f", if search.halving were {{steps: [{', '.join(map(str, thinned.steps))}]}}"
        message += f", {about} {duration(halved)} with{how}"
    lines.insert(1, f"The whole search takes {message}, one trial at a time.")
    spent = store.seconds() if store else 0.0
    return lines + proxy_lines + _repeat_lines(plan, expected) + _budget_lines(plan.config.search, spent)


def _proxy(plan: SearchPlan, goes_on: bool, a_step: float, ranks: int) -> tuple[list[str], float]:
    """What the proxy's pass takes, in a sentence and in seconds; nothing where there is none or it was made before."""
    train = plan.config.train
    if plan.config.search.proxy == "none" or (goes_on and known_statistics(plan)):
        return [], 0.0
    items_a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    seconds = 2 * ITEMS / items_a_step * a_step
    line = (
        f"The proxy's pass comes first: gradients of all weights for at most {ITEMS} items of either data, by the "
        f"step's time about {duration(seconds)}, besides loading the model."
    )
    return [line], seconds


def _work(plan: SearchPlan, rungs: SuccessiveHalving | None) -> Work:
    """The most that all levels may come to."""
    search = plan.config.search
    steps = parts = 0
    for level in plan.planned:
        count = level.most
        before = 0
        for step in rungs.steps if rungs else ():
            if rungs is None or rungs.spare_all(count, search.beam):
                continue
            steps, parts = steps + count * (step - before), parts + count
            count, before = rungs.most_after(count, search.beam), step
        steps, parts = steps + count * (search.train_steps - before), parts + count
    return Work(steps, parts)


def _usual_rungs(search: Search) -> SuccessiveHalving | None:
    """What halving would usually be, for who has not thought of it."""
    steps = sorted({search.train_steps // 4, search.train_steps // 2} - {0})
    return SuccessiveHalving(tuple(steps), early_stop=search.early_stop) if steps else None


def _repeat_lines(plan: SearchPlan, expected: Expected) -> list[str]:
    """What the further seeds take that follow."""
    search, count = plan.config.search, plan.most_repeats
    if not count:
        return []
    seconds = expected.seconds(count * search.train_steps, count)
    best, seeds = min(search.repeat_regions, plan.at_most), many(search.most_seeds - 1, "further seed")
    if search.repeat == "auto":
        return [
            f"Then those of the {best} best that tie are trained with up to {seeds}: at most {many(count, 'trial')}, "
            f"{duration(seconds)}."
        ]
    return [f"Then the {best} best are trained with {seeds}: {many(count, 'trial')}, about {duration(seconds)}."]


def _budget_lines(requested: Search, spent: float) -> list[str]:
    limits = [f"{requested.budget_hours:g} hours"] if requested.budget_hours else []
    limits += [many(requested.budget_trials, "trial")] if requested.budget_trials else []
    if not limits:
        return []
    so_far = f"; {duration(spent)} are spent already" if spent else ""
    return [f"The budget ends it after {' or '.join(limits)}{so_far}: the best region so far is the winner then."]


def _prefix_lines(plan: SearchPlan) -> list[str]:
    kind, layers = plan.config.search.prefix_cache, plan.lowest_layers
    if kind == "none" or not plan.prefix_bytes or not layers:
        return []
    where = "memory" if kind == "memory" else str(plan.folder)
    size = gib(plan.prefix_bytes)
    return [
        f"The prefix cache takes {size} in {where} for each layer that it keeps the input of, at most "
        f"{gib(plan.prefix_bytes * len(layers))} for {many(len(layers), 'layer')}."
    ]
