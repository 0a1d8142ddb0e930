"""What a search that has ended says of itself: the rows of its tree, its sentences, and tree.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from cofitune.recipes.search.plan import SearchPlan
from cofitune.recipes.search.proxy import Proxy
from cofitune.recipes.search.repeats import Decision
from cofitune.recipes.search.trials import Trials
from cofitune.reports.search.loss_sentences import (
    ONE_SEED,
    loss_winner_sentence,
    margin_sentence,
    race_sentence,
    reliability_sentence,
)
from cofitune.reports.search.row import LOSSES, Row
from cofitune.reports.search.sentences import (
    Aim,
    proxy_sentence,
    pruned_sentence,
    stopped_sentence,
    tie_sentence,
    untried_sentence,
    winner_sentence,
)
from cofitune.search.equal_loss import UNIT, EqualLoss
from cofitune.search.proxy import rank_correlation
from cofitune.search.store import Store
from cofitune.search.trial import Trial


@dataclass(frozen=True)
class Result:
    """The base's row, the trials' rows in the order they were reached, the sentences, and the content of tree.json."""

    base: Row
    rows: tuple[Row, ...]
    sentences: tuple[str, ...]
    tree: dict[str, object]


def row_of(trial: Trial, store: Store) -> Row:
    """A trial as the tree shows it, before anything is known of the winner."""
    row = Row(
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
    if not trial.curve:
        return row
    return replace(row, scale=LOSSES, speciality=trial.loss, versatility=trial.drift, margins=trial.margins)


def make_result(plan: SearchPlan, decision: Decision, trials: Trials, proxy: Proxy | None) -> Result:
    """Compare every finished trial with the winner, judge the proxy, and put it all into words and into JSON."""
    result, objective, store = decision.result, decision.objective, trials.store
    rows = tuple(_row(trial, decision, trials) for trial in result.trials)
    base = objective.base
    if base is None:
        raise ValueError("a search has a base")
    base_row = row_of(base, store)
    finished = [trial for trial in result.trials if trial.done and trial.region is not None]
    guesses = {t.id: proxy.proxy_score(t.region) for t in result.trials if t.region is not None} if proxy else {}
    correlation = rank_correlation([guesses[t.id] for t in finished], objective.ranks(finished)) if proxy else None
    runner_up = result.runner_up.id if result.runner_up else None
    untried = result.untried
    sentences = [
        *_winner_sentences(base_row, rows, decision),
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
        **_about_losses(plan, decision),
        **_about_seeds(decision),
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


def _winner_sentences(base: Row, rows: tuple[Row, ...], decision: Decision) -> list[str | None]:
    """Who won, what that was worth, and what ties with it."""
    winner, objective = decision.result.winner, decision.objective
    runner_up = decision.result.runner_up.id if decision.result.runner_up else None
    by_loss = isinstance(objective, EqualLoss)
    seeds = _seeds_sentence(rows, decision, UNIT if by_loss else "points")
    if not by_loss:
        aim = Aim(objective.score, objective.floor)
        return [winner_sentence(base, rows, winner.id, runner_up, aim), seeds, tie_sentence(rows, winner.id)]
    won = next(row for row in rows if row.id == winner.id)
    first = loss_winner_sentence(base, rows, winner.id, runner_up, decision.common)
    return [first, seeds or ONE_SEED, margin_sentence(base, won)]


def _seeds_sentence(rows: tuple[Row, ...], decision: Decision, unit: str) -> str | None:
    judged = decision.reliability
    if judged is None:
        return None
    tied, others = len(judged.ties(decision.result.winner.id)), len(judged.means) - 1
    repeats = decision.repeats
    if repeats.race is None:
        return reliability_sentence(
            len(judged.seeds), len(judged.regions), judged.correlation, judged.standard_error, unit, tied, others
        )
    further = sum(map(len, repeats.trials.values()))
    return race_sentence(
        len(repeats.trials), further, len(judged.seeds), len(repeats.race.left), repeats.race.reason, judged.deviation,
        unit, tied, others,
    )  # fmt: skip


def _about_losses(plan: SearchPlan, decision: Decision) -> dict[str, object]:
    """What tree.json tells besides of a search by losses."""
    if plan.measure.kind == "score":
        return {}
    return {"measure": "loss", "unit": UNIT, "lower_is_better": True, "common_loss": decision.common}


def _about_seeds(decision: Decision) -> dict[str, object]:
    """What tree.json tells besides of a search with several seeds."""
    judged = decision.reliability
    if judged is None:
        return {}
    return {
        "reliability": {
            "seeds": list(judged.seeds),
            "rank_correlation": judged.correlation,
            "deviation": judged.deviation,
            "standard_error": judged.standard_error,
            "means": judged.means,
            "tied": list(judged.ties(decision.result.winner.id)),
        },
        "repeats": [json.loads(trial.to_json()) for own in decision.repeats.trials.values() for trial in own],
        **({"race": {"left": list(race.left), "ended": race.reason}} if (race := decision.repeats.race) else {}),
    }


def _row(trial: Trial, decision: Decision, trials: Trials) -> Row:
    """A trial beside the winner. Only what was trained to its end is compared with it."""
    row, result, objective = row_of(trial, trials.store), decision.result, decision.objective
    if not trial.done:
        return row
    if isinstance(objective, EqualLoss):
        judged = decision.reliability
        drift, best = (objective.drift_of(one, decision.common) for one in (trial, result.winner))
        if judged is not None:
            tied = trial.id in judged.ties(result.winner.id)
        else:
            finished = [one for one in result.trials if one.done and one.region is not None]
            drifts = [d for one in finished if (d := objective.drift_of(one, decision.common)) is not None]
            tied = drift is not None and best is not None and drift <= objective.equal_up_to(drifts)
        return replace(row, unified=drift, tied=tied and trial.id != result.winner.id)
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


def _of_trial(trial: Trial, row: Row, guess: float | None) -> dict[str, object]:
    """A trial in tree.json: its line in the store, all of its seconds, and what it is beside the winner."""
    content: dict[str, object] = json.loads(trial.to_json()) | {"seconds": round(row.seconds, 1)}
    if trial.curve:
        content |= {"speciality_loss": trial.loss, "drift": trial.drift, "drift_at_common_loss": row.unified}
        content |= {"tied": row.tied}
    content["to_winner"] = (
        dict(zip(("value", "low", "high"), row.behind, strict=True)) | {"tied": row.tied} if row.behind else None
    )
    if row.missed:
        content["misses_floor_by"] = row.missed
    if guess is not None:
        content["proxy"] = guess
    return content
