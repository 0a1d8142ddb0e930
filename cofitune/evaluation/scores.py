"""From shares of right answers to speciality, versatility and unified (DESIGN §4: ours; the paper's own is unknown)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VERSATILITY = ("gen_kn", "gen_rs", "instruct")


@dataclass(frozen=True)
class TaskScore:
    """A task's category and its share of right answers `raw` with the share that guessing gives, `chance`: 0 to 1."""

    category: str
    raw: float
    chance: float

    @property
    def normalised(self) -> float:
        """0 is guessing, 100 is all right; below 0 is worse than guessing."""
        return normalise(self.raw, self.chance)


@dataclass(frozen=True)
class Summary:
    """The scores of one model, 0 to 100; None where there is no task to take them from.

    Attributes:
        categories: mean of each category's tasks.
        versatility: mean of those of gen_kn, gen_rs and instruct that have tasks.
        unified: w·speciality + (1 − w)·versatility.
        missing: categories without a task, which no mean counts as 0.
    """

    categories: dict[str, float | None]
    versatility: float | None
    unified: float | None
    missing: tuple[str, ...]

    @property
    def speciality(self) -> float | None:
        """Mean of the speciality tasks."""
        return self.categories["speciality"]


@dataclass(frozen=True)
class Changes:
    """What training changed, in points of the 0–100 scores (run − base); None where either is.

    Attributes:
        spec_gain: of speciality.
        categories: of each general category; what is below 0 was forgotten.
        versatility: of versatility.
        unified: of unified.
        versatility_retained: the run's versatility in percent of the base's; None where the base has none to keep.
    """

    spec_gain: float | None
    categories: dict[str, float | None]
    versatility: float | None
    unified: float | None
    versatility_retained: float | None


def normalise(raw: float, chance: float) -> float:
    """s' = 100·(s − chance)/(1 − chance)."""
    return 100 * (raw - chance) / (1 - chance)


def summarise(tasks: Mapping[str, TaskScore], speciality_weight: float = 0.5) -> Summary:
    """Average the normalised task scores (by title) into categories, and those into versatility and unified."""
    categories = {
        name: _mean([t.normalised for t in tasks.values() if t.category == name])
        for name in ("speciality", *VERSATILITY)
    }
    speciality = categories["speciality"]
    versatility = _mean([value for name in VERSATILITY if (value := categories[name]) is not None])
    unified = None
    if speciality is not None and versatility is not None:
        unified = speciality_weight * speciality + (1 - speciality_weight) * versatility
    missing = tuple(name for name, value in categories.items() if value is None)
    return Summary(categories, versatility, unified, missing)


def compare(base: Summary, run: Summary) -> Changes:
    """What a run gained and forgot against the base that it was trained from."""
    retained = None
    if base.versatility is not None and run.versatility is not None and base.versatility > 0:
        retained = 100 * run.versatility / base.versatility
    return Changes(
        spec_gain=_change(base.speciality, run.speciality),
        categories={name: _change(base.categories[name], run.categories[name]) for name in VERSATILITY},
        versatility=_change(base.versatility, run.versatility),
        unified=_change(base.unified, run.unified),
        versatility_retained=retained,
    )


def put_together(
    tasks: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
    run: Mapping[str, Any] | None,
    speciality_weight: float = 0.5,
) -> dict[str, Any]:
    """The part of `scores.json` that is computed: both models' summaries, and what changed between them.

    Args:
        tasks: category and chance of each task, by title.
        base: `tasks` of each title with its `raw`; whatever else it says is kept.
        run: likewise, or None where only the base was scored.
        speciality_weight: w in unified = w·speciality + (1 − w)·versatility.
    """
    before = _summary(tasks, base, speciality_weight)
    after = _summary(tasks, run, speciality_weight) if run else None
    return {
        "speciality_weight": speciality_weight,
        "missing": list(before.missing),
        "base": _with_summary(tasks, base, before),
        "run": _with_summary(tasks, run, after) if run and after else None,
        "changes": asdict(compare(before, after)) if after else None,
    }


def _task_scores(tasks: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any]) -> dict[str, TaskScore]:
    return {
        title: TaskScore(about["category"], model["tasks"][title]["raw"], about["chance"])
        for title, about in tasks.items()
    }


def _summary(tasks: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], weight: float) -> Summary:
    return summarise(_task_scores(tasks, model), weight)


def _with_summary(tasks: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], summary: Summary) -> dict[str, Any]:
    normalised = {title: score.normalised for title, score in _task_scores(tasks, model).items()}
    return dict(model) | {
        "tasks": {title: model["tasks"][title] | {"normalised": value} for title, value in normalised.items()},
        "categories": summary.categories,
        "versatility": summary.versatility,
        "unified": summary.unified,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
