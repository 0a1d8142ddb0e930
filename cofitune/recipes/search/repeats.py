"""Further seeds of a search's leading regions (`search.repeat`): they are trained, and the winner is taken again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cofitune.recipes.search.plan import SearchPlan
from cofitune.search.equal_loss import EqualLoss
from cofitune.search.level import Job, LevelRunner, OnTrial, RunJobs, SearchSettings
from cofitune.search.objective import Objective, Ranking
from cofitune.search.repeat import Reliability, judge_seeds
from cofitune.search.seed_race import SeedRace, race_seeds
from cofitune.search.store import Store
from cofitune.search.tree import SearchResult
from cofitune.search.trial import Trial


@dataclass(frozen=True)
class Repeats:
    """Trainings with further seeds.

    Attributes:
        trials: by the id of a region's first trial those with further seeds that ended, failed ones included.
        race: how the rounds ended, where the number of seeds was left open.
    """

    trials: dict[str, tuple[Trial, ...]] = field(default_factory=dict)
    race: SeedRace | None = None


@dataclass(frozen=True)
class Decision:
    """What a search comes to.

    Attributes:
        result: with the winner by the mean over the seeds, where there are several.
        repeats: the trials with further seeds.
        reliability: None with one seed.
        common: under losses, the speciality loss at which all trials are compared, in nats a token.
        objective: what trials are ranked by.
    """

    result: SearchResult
    repeats: Repeats
    reliability: Reliability | None
    common: float | None
    objective: Ranking


def repeat_leaders(
    plan: SearchPlan, rules: SearchSettings, result: SearchResult, run_jobs: RunJobs, store: Store, on_trial: OnTrial
) -> Repeats:
    """Train the best regions with further seeds, as far as the budget goes: with all of them, or in rounds."""
    search, first = plan.config.search, plan.config.train.seed
    finished = rules.objective.order([trial for trial in result.trials if trial.done])
    leaders = {trial.id: trial for trial in finished[: search.repeat_regions]}
    runner = LevelRunner(replace(rules, rungs=None), run_jobs, store, on_trial)
    repeats: dict[str, tuple[Trial, ...]] = dict.fromkeys(leaders, ())

    def train(ids: Sequence[str], seed: int) -> str | None:
        jobs = [
            Job(store.id_of(leader.region, seed), leader.region, leader.level, leader.id, seed=seed)
            for leader in (leaders[name] for name in ids)
            if leader.region is not None
        ]
        ended = runner.run(jobs)
        for name in ids:
            region = leaders[name].region
            if region is not None and region in ended:
                repeats[name] = (*repeats[name], ended[region])
        return runner.ended

    seeds = range(first + 1, first + search.most_seeds)
    if search.repeat != "auto":
        for seed in seeds:
            train(list(leaders), seed)
        return Repeats(repeats)

    def values() -> dict[str, list[float | None]]:
        figures = _figures(plan, rules.objective, result, repeats)[0]
        return {name: figures[name] for name in leaders}

    # what misses a floor that the best one keeps is told from it by that
    most = rules.objective.shortfall(finished[0])
    racing = [name for name, leader in leaders.items() if rules.objective.shortfall(leader) <= most]
    by_loss = isinstance(rules.objective, EqualLoss)
    return Repeats(repeats, race_seeds(racing, seeds, train, values, lower_is_better=by_loss))


def decide(plan: SearchPlan, objective: Ranking, result: SearchResult, repeats: Repeats) -> Decision:
    """Take the winner by what decides; with several seeds by the mean over them, of the regions that have them all.

    After rounds of seeds it is the best mean of the regions that are left.
    """
    values, common = _figures(plan, objective, result, repeats.trials)
    if plan.config.search.repeat == 1:
        return Decision(result, Repeats(), None, common, objective)
    first = plan.config.train.seed
    trained = max(map(len, values.values()), default=1) if repeats.race else plan.config.search.most_seeds
    reliability = judge_seeds(values, range(first, first + trained))
    left = set(repeats.race.left) if repeats.race else _with_all_seeds(reliability)
    best = _by_mean(objective, result, reliability, left)
    return Decision(_with_winner(result, best), repeats, reliability, common, objective)


def _figures(
    plan: SearchPlan, objective: Ranking, result: SearchResult, repeats: Mapping[str, Sequence[Trial]]
) -> tuple[dict[str, list[float | None]], float | None]:
    """What decides, of every finished region a figure a seed; and under losses the loss at which all are compared."""
    finished = [trial for trial in result.trials if trial.done]
    further = [trial for own in repeats.values() for trial in own if trial.done]
    common = objective.common_loss([*finished, *further]) if isinstance(objective, EqualLoss) else None
    value = _value_of(objective, common)
    values: dict[str, list[float | None]] = {trial.id: [value(trial)] for trial in finished}
    search, begin = plan.config.search, plan.config.train.seed + 1
    for first, own in repeats.items():
        by_seed = {trial.seed: value(trial) for trial in own if trial.done}
        # in rounds, seeds that were not asked for are none that failed
        end = max((trial.seed + 1 for trial in own), default=begin) if search.repeat == "auto" else None
        asked = range(begin, end or begin - 1 + search.most_seeds)
        values[first] += [by_seed.get(seed) for seed in asked]
    return values, common


def _with_all_seeds(reliability: Reliability) -> set[str]:
    whole = len(reliability.seeds)
    return {region for region in reliability.regions if reliability.counts.get(region) == whole}


def _value_of(objective: Ranking, common: float | None) -> Callable[[Trial], float | None]:
    """What decides, of one trial: a score, or the drift at the common loss."""
    if isinstance(objective, EqualLoss):
        return lambda trial: objective.drift_of(trial, common)
    if isinstance(objective, Objective):
        return objective.value
    raise TypeError(f"no figure of {objective}")


def _by_mean(objective: Ranking, result: SearchResult, reliability: Reliability, among: set[str]) -> list[Trial]:
    """Some regions, best mean first; they keep the floor as the winner does."""
    sign = 1 if isinstance(objective, EqualLoss) else -1
    most = objective.shortfall(result.winner)
    whole = [
        trial
        for trial in result.trials
        if trial.id in among and trial.id in reliability.means and objective.shortfall(trial) <= most
    ]
    return sorted(whole, key=lambda trial: (sign * reliability.means[trial.id], trial.num_trained))


def _with_winner(result: SearchResult, best: Sequence[Trial]) -> SearchResult:
    if not best:
        return result
    others = (result.winner, result.runner_up)
    second = best[1] if len(best) > 1 else next((t for t in others if t is not None and t.id != best[0].id), None)
    return replace(result, winner=best[0], runner_up=second)
