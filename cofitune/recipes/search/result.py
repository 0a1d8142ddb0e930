"""What a search that has ended says of itself: the rows of its tree, its sentences, and tree.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from cofitune.config.schema import Config
from cofitune.recipes.search.plan import Plan
from cofitune.recipes.search.proxy import Proxy
from cofitune.recipes.search.trials import Trials
from cofitune.reports.search.sentences import (
    Aim,
    proxy_sentence,
    pruned_sentence,
    stopped_sentence,
    tie_sentence,
    untried_sentence,
    winner_sentence,
)
from cofitune.reports.search.tree import Row
from cofitune.search.objective import Objective
from cofitune.search.proxy import rank_correlation
from cofitune.search.store import Store
from cofitune.search.tree import SearchResult
from cofitune.search.trial import Trial


@dataclass(frozen=True)
class Result:
    """The base's row, the trials' rows in the order they were reached, the sentences, and the content of tree.json."""

    base: Row
    rows: tuple[Row, ...]
    sentences: tuple[str, ...]
    tree: dict[str, Any]


def row_of(trial: Trial, store: Store) -> Row:
    """A trial as the tree shows it, before anything is known of the winner."""
    return Row(
        id=trial.id,
        parent=trial.parent,
        region=trial.region,
        level=trial.level,
        num_trained=trial.num_trained,
        speciality=trial.speciality,
        versatility=trial.versatility,
        unified=trial.unified,
        seconds=store.seconds(trial.id),
        reason=trial.reason if trial.scored else trial.reason or "no reason was given",
        status=trial.status,
        steps=trial.steps,
        intervals=trial.intervals,
    )


def make_result(
    config: Config,
    plan: Plan,
    store: Store,
    result: SearchResult,
    objective: Objective,
    trials: Trials,
    proxy: Proxy | None,
) -> Result:
    """Compare every finished trial with the winner, judge the proxy, and put it all into words and into JSON."""
    rows = tuple(_row(trial, result, store, objective, trials) for trial in result.trials)
    base = objective.base
    if base is None:
        raise ValueError("a search has a base")
    base_row = row_of(base, store)
    finished = [trial for trial in result.trials if trial.done and trial.region is not None]
    guesses = {t.id: proxy.proxy_score(t.region) for t in result.trials if t.region is not None} if proxy else {}
    correlation = (
        rank_correlation([guesses[t.id] for t in finished], list(map(objective.value, finished))) if proxy else None
    )
    runner_up = result.runner_up.id if result.runner_up else None
    untried = result.untried
    aim = Aim(objective.score, objective.floor)
    sentences = [
        winner_sentence(base_row, rows, result.winner.id, runner_up, aim),
        tie_sentence(rows, result.winner.id),
        stopped_sentence(rows),
        untried_sentence(untried.reason, untried.regions, [str(level) for level in untried.levels]),
        pruned_sentence(untried.pruned),
        proxy_sentence(correlation, len(finished)) if proxy else None,
    ]
    output = tuple(sentence for sentence in sentences if sentence)
    content = {
        "winner": result.winner.id,
        "runner_up": runner_up,
        "reason": output[0],
        "sentences": list(output),
        "objective": {"score": objective.score, "floor": objective.floor},
        "levels": [
            {"tries": str(level), "expanded": list(ids)}
            for level, ids in zip(plan.levels, result.expanded, strict=False)  # a budget leaves levels unbegun
        ],
        "base": _of_trial(base, base_row, None),
        "trials": [
            _of_trial(trial, row, guesses.get(trial.id)) for trial, row in zip(result.trials, rows, strict=True)
        ],
        "not_tried": {
            "reason": untried.reason,
            "regions": [region.to_dict() for region in untried.regions],
            "levels": [str(level) for level in untried.levels],
            "pruned": [region.to_dict() for region in untried.pruned],
        },
        "proxy": {"rank_correlation": correlation, "trials": len(finished)} if proxy else None,
        "seconds": round(store.seconds(), 1),
        "identity": plan.identity,
    }
    return Result(base_row, rows, output, content)


def _row(trial: Trial, result: SearchResult, store: Store, objective: Objective, trials: Trials) -> Row:
    """A trial beside the winner. Only what was trained to its end is compared with it."""
    row = row_of(trial, store)
    if not trial.done:
        return row
    missed = objective.shortfall(trial)
    row = replace(row, missed=missed)
    if trial.id == result.winner.id:
        return row
    behind = trials.compare(trial, result.winner)
    if behind is None:
        return row
    # one that misses a floor which the winner keeps is told from it by that
    tied = behind.holds_zero and not missed > objective.shortfall(result.winner)
    return replace(row, behind=(behind.value, behind.low, behind.high), tied=tied)


def _of_trial(trial: Trial, row: Row, guess: float | None) -> dict[str, Any]:
    """A trial in tree.json: its line in the store, all of its seconds, and what it is beside the winner."""
    content = json.loads(trial.to_json()) | {"seconds": round(row.seconds, 1)}
    content["to_winner"] = (
        dict(zip(("value", "low", "high"), row.behind, strict=True)) | {"tied": row.tied} if row.behind else None
    )
    if row.missed:
        content["misses_floor_by"] = row.missed
    return content | ({} if guess is None else {"proxy": guess})
