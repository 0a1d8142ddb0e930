"""From every model's answers to the content of `scores.json`: scores, paired changes, ratios, noise, lost items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from cofitune.errors import UserError
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.evaluation.statistics.paired import (
    CONFIDENCE,
    DRAWS,
    SEED,
    Bootstrap,
    Estimate,
    Ratio,
    TaskItems,
    compare_tasks,
    noise_limit,
    seed_noise,
)
from cofitune.evaluation.statistics.scores import SUMMARIES

Results = Mapping[str, Mapping[str, TaskResult]]  # by model, by task title
ONE_SEED = "it takes two runs of one config with different training seeds"


@dataclass(frozen=True)
class Compared:
    """The models of one table: the base and perhaps `full_sft` by name, and groups of runs that differ by seed only."""

    base: str
    full_sft: str | None = None
    seed_groups: tuple[tuple[str, ...], ...] = ()


def build_scores(results: Results, compared: Compared, speciality_weight: float = 0.5) -> dict[str, Any]:
    """The part of `scores.json` that is computed.

    Args:
        results: every model's result on every task, the same tasks and items for all.
        compared: who is compared with whom.
        speciality_weight: w in unified = w·speciality + (1 − w)·versatility.

    Returns:
        `models` (scores by name), `comparisons` (a list: each model against the base, and against full fine-tuning
        where that is there), `noise_floor` and how the intervals were made.

    Raises:
        UserError: the models were not asked the same items.
    """
    names = list(results)
    bootstrap = Bootstrap(match_items(results), speciality_weight)
    noise = _noise(bootstrap, names, compared)
    pairs = [(model, compared.base) for model in names if model != compared.base]
    if compared.full_sft is not None:
        pairs += [(model, compared.full_sft) for model in names if model not in (compared.base, compared.full_sft)]
    comparisons = [
        _compare(bootstrap, names, pair, noise["limits"]["base" if pair[1] == compared.base else "trained"])
        | {"ratios": _ratios(bootstrap, names, compared, *pair)}
        for pair in pairs
    ]
    return {
        "speciality_weight": speciality_weight,
        "missing": list(bootstrap.summary(0).missing),
        "models": {name: _model(bootstrap, index, results[name]) for index, name in enumerate(names)},
        "comparisons": comparisons,
        "noise_floor": noise,
        "intervals": {
            "confidence": CONFIDENCE,
            "method": "paired bootstrap, stratified by task, two coin items a task, percentiles",
            "draws": DRAWS,
            "seed": SEED,
        },
    }


def match_items(results: Results) -> dict[str, TaskItems]:
    """Put every model's answers on the same items side by side, by what was asked and what is right.

    Raises:
        UserError: two models were asked different tasks or items.
    """
    first, *others = results
    tasks = {}
    for title, result in results[first].items():
        asked = [content(s) for s in result.samples]
        rows = [[s.score for s in result.samples]]
        for name in others:
            other = results[name].get(title)
            if other is None or [content(s) for s in other.samples] != asked:
                raise UserError(
                    f"'{first}' and '{name}' were not asked the same items of task '{title}', so they cannot be put "
                    "side by side"
                )
            rows.append([s.score for s in other.samples])
        tasks[title] = TaskItems(result.category, result.metric, result.chance, np.array(rows, dtype=np.float64))
    return tasks


def content(sample: Sample) -> str:
    """Hash an item: what the model saw and what is right."""
    text = json.dumps([sample.prompt, sample.reference], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_items(
    results: Results, comparison: Mapping[str, Any], choices: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, list[dict[str, object]]]:
    """The items that a model lost and gained, with their text and both answers, for a person to look at.

    Args:
        comparison: an entry of `comparisons`.
        choices: each task's choices, an entry an item, where it has some.
    """
    found: dict[str, list[dict[str, object]]] = {"lost": [], "gained": []}
    for title, change in comparison["tasks"].items():
        before, after = results[comparison["against"]][title].samples, results[comparison["model"]][title].samples
        for what, entries in found.items():
            for index in change[what]:
                sample, own = before[index], choices[title][index]
                entries.append(
                    {"task": title, "line": sample.line, "prompt": sample.prompt, "reference": sample.reference}
                    | ({"choices": list(own)} if own else {})
                    | {"before": _answer(sample), "after": _answer(after[index])}
                )
    return found


def _compare(
    bootstrap: Bootstrap, names: list[str], pair: tuple[str, str], limits: Mapping[str, Mapping[str, float]]
) -> dict[str, object]:
    """One model's changes against another, with the mark of those that another training seed alone could make."""
    model, against = (names.index(name) for name in pair)

    def told(change: Estimate, noise: float | None) -> dict[str, object]:
        return asdict(change) | {"within_noise": None if noise is None else abs(change.value) < noise}

    summary = {name: bootstrap.change(name, model, against) for name in SUMMARIES}

    return {
        "model": pair[0],
        "against": pair[1],
        "summary": {
            n: None if change is None else told(change, limits["summary"].get(n)) for n, change in summary.items()
        },
        "tasks": {
            title: told(result.change, limits["tasks"].get(title))
            | {"lost": list(result.lost), "gained": list(result.gained), "p": result.p, "p_holm": result.p_holm}
            for title, result in compare_tasks(bootstrap, model, against).items()
        },
    }


def _ratios(bootstrap: Bootstrap, names: list[str], compared: Compared, model: str, against: str) -> dict[str, object]:
    """What is kept of the base's versatility; beside full fine-tuning, how much of its gain and of its loss.

    `vers_recovery` is 100 where nothing of what full fine-tuning forgot was forgotten, and 0 where all of it was;
    `spec_gain_kept` is 100 where all that it gained was gained.
    """
    index, base = names.index(model), names.index(compared.base)
    if against == compared.base:
        kept = bootstrap.ratio("versatility", (index, None), (base, None), f"the versatility of '{compared.base}'")
        return {"versatility_retained": _ratio(kept)}
    full = names.index(against)
    recovery = bootstrap.ratio("versatility", (index, full), (base, full), f"what '{against}' forgot of versatility")
    gain = bootstrap.ratio("speciality", (index, base), (full, base), f"what '{against}' gained of speciality")
    return {"vers_recovery": _ratio(recovery), "spec_gain_kept": _ratio(gain)}


def _ratio(ratio: Ratio) -> dict[str, object]:
    """A ratio in percent with its interval; null with a reason where it is undefined."""
    if ratio.estimate is None:
        return {"value": None, "low": None, "high": None, "reason": ratio.reason}
    return asdict(ratio.estimate) | {"reason": None}


def _noise(bootstrap: Bootstrap, names: list[str], compared: Compared) -> dict[str, Any]:
    """Standard deviation of every score over training seeds; null with a reason where there is one seed only.

    `limits`: by how much a change against the base, and against a trained run, must differ from 0 to be more than that
    (`noise_limit`).
    """
    if not compared.seed_groups:
        unknown: dict[str, dict[str, float]] = {"summary": {}, "tasks": {}}
        return {"scores": None, "limits": {"base": unknown, "trained": unknown}, "runs": [], "reason": ONE_SEED}
    groups = [[names.index(name) for name in group] for group in compared.seed_groups]
    scores = {
        "summary": seed_noise([[bootstrap.summary(m).by_name() for m in group] for group in groups]),
        "tasks": seed_noise(
            [[{title: s.score for title, s in bootstrap.task_scores(m).items()} for m in group] for group in groups]
        ),
    }
    freedom, runs = sum(len(group) - 1 for group in groups), min(len(group) for group in groups)
    limits = {}
    for against in ("base", "trained"):
        limit = partial(noise_limit, freedom=freedom, runs=runs, both_trained=against == "trained")
        limits[against] = {part: {name: limit(s) for name, s in figures.items()} for part, figures in scores.items()}
    told = [list(group) for group in compared.seed_groups]
    return {"scores": scores, "limits": limits, "freedom": freedom, "runs": told, "reason": None}


def _model(bootstrap: Bootstrap, model: int, results: Mapping[str, TaskResult]) -> dict[str, object]:
    summary = bootstrap.summary(model)
    return {
        "tasks": {
            title: {"raw": score.raw, "score": score.score, "seconds": round(results[title].seconds, 1)}
            | ({"others": results[title].others} if results[title].others else {})
            for title, score in bootstrap.task_scores(model).items()
        },
        "categories": summary.categories,
        "versatility": summary.versatility,
        "unified": summary.unified,
    }


def _answer(sample: Sample) -> dict[str, object]:
    return {k: v for k, v in sample.as_dict().items() if k in ("answer", "log_likelihoods", "pick", "score")}
