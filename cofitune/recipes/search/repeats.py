"""Further seeds of a search's leading regions (`search.repeat`): they are trained, and the winner is taken again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cofitune.recipes.search.plan import SearchPlan
from cofitune.search.equal_loss import EqualLoss
from cofitune.search.level import Job, LevelRunner, OnTrial, RunJobs, SearchSettings
from cofitune.search.objective import Objective, Ranking
from cofitune.search.repeat import Reliability, judge_seeds
from cofitune.search.store import Store
from cofitune.search.tree import SearchResult
from cofitune.search.trial import Trial


@dataclass(frozen=True)
class Decision:
    """What a search comes to.

    Attributes:
        result: with the winner by the mean over the seeds, where there are several.
        repeats: the trials with further seeds, by the id of the region's first one.
        reliability: None with one seed.
        common: under losses, the speciality loss at which all trials are compared, in nats a token.
    """

    result: SearchResult
    repeats: dict[str, tuple[Trial, ...]]
    reliability: Reliability | None
    common: float | None


def repeat_leaders(
    plan: SearchPlan, rules: SearchSettings, result: SearchResult, run_jobs: RunJobs, store: Store, on_trial: OnTrial
) -> dict[str, tuple[Trial, ...]]:
    """Train the best regions with further seeds, as far as the budget goes.

    Returns:
        By the id of a region's first trial those with further seeds that ended, failed ones included.
    """
    search, first = plan.config.search, plan.config.train.seed
    finished = rules.objective.order([trial for trial in result.trials if trial.done])
    leaders = finished[: search.repeat_regions]
    runner = LevelRunner(replace(rules, rungs=None), run_jobs, store, on_trial)
    repeats: dict[str, tuple[Trial, ...]] = {trial.id: () for trial in leaders}
    for seed in range(first + 1, first + search.repeat):
        jobs = [
            Job(store.id_of(leader.region, seed), leader.region, leader.level, leader.id, seed=seed)
            for leader in leaders
            if leader.region is not None
        ]
        ended = runner.run(jobs)
        for leader in leaders:
            if leader.region in ended:
                repeats[leader.id] = (*repeats[leader.id], ended[leader.region])
    return repeats


def decide(
    plan: SearchPlan, objective: Ranking, result: SearchResult, repeats: dict[str, tuple[Trial, ...]]
) -> Decision:
    """Take the winner by what decides; with several seeds by the mean over them, of the regions that have them all."""
    finished = [trial for trial in result.trials if trial.done]
    further = [trial for own in repeats.values() for trial in own if trial.done]
    common = objective.common_loss([*finished, *further]) if isinstance(objective, EqualLoss) else None
    if plan.config.search.repeat == 1:
        return Decision(result, {}, None, common)
    value = _value_of(objective, common)
    seeds = range(plan.config.train.seed, plan.config.train.seed + plan.config.search.repeat)
    values: dict[str, list[float | None]] = {trial.id: [value(trial)] for trial in finished}
    for first, own in repeats.items():
        by_seed = {trial.seed: value(trial) for trial in own if trial.done}
        values[first] += [by_seed.get(seed) for seed in seeds[1:]]
    reliability = judge_seeds(values, seeds)
    best = _by_mean(objective, result, reliability)
    return Decision(_with_winner(result, best), repeats, reliability, common)


def _value_of(objective: Ranking, common: float | None) -> Callable[[Trial], float | None]:
    """What decides, of one trial: a score, or the drift at the common loss."""
    if isinstance(objective, EqualLoss):
        return lambda trial: objective.drift_of(trial, common)
    if isinstance(objective, Objective):
        return objective.value
    raise TypeError(f"no figure of {objective}")


def _by_mean(objective: Ranking, result: SearchResult, reliability: Reliability) -> list[Trial]:
    """The regions that have a figure of every seed, best mean first; they keep the floor as the winner does."""
    sign = 1 if isinstance(objective, EqualLoss) else -1
    most = objective.shortfall(result.winner)
    whole = [
        trial
        for trial in result.trials
        if trial.id in reliability.regions
        and reliability.counts.get(trial.id) == len(reliability.seeds)
        and objective.shortfall(trial) <= most
    ]
    return sorted(whole, key=lambda trial: (sign * reliability.means[trial.id], trial.num_trained))


def _with_winner(result: SearchResult, best: Sequence[Trial]) -> SearchResult:
    if not best:
        return result
    others = (result.winner, result.runner_up)
    second = best[1] if len(best) > 1 else next((t for t in others if t is not None and t.id != best[0].id), None)
    return replace(result, winner=best[0], runner_up=second)
