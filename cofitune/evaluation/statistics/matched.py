"""Methods at matched speciality: from every model's draws to the content of `compare.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cofitune.evaluation.statistics.frontier import (
    Array,
    at_level,
    at_level_of_fewer,
    dominated_by,
    frontier,
    place,
    seed_weights,
)
from cofitune.evaluation.statistics.paired import CONFIDENCE, DRAWS, SEED, Bootstrap, estimate
from cofitune.evaluation.statistics.scores import SUMMARIES

BASE = "base"
COMPARED = ("versatility", "gen_kn", "gen_rs", "instruct")
TASK = "task:"  # before a task's title, among the names of summary scores
# of the draws must have the level inside of both ranges, for an interval to be given: the others drop out, and an
# interval of what is left holds on condition that the level is reached
ENOUGH_DRAWS = 0.95


@dataclass(frozen=True)
class Point:
    """One setting of a method: `models` holds its runs' places among the bootstrap's models, a seed each."""

    id: str
    learning_rate: float
    alpha: float
    models: tuple[int, ...]


@dataclass(frozen=True)
class _Curve:
    """A method's points with the base, which is every method's alpha 0. Scores are [1, P] as they are and [D, P]."""

    ids: tuple[str, ...]
    scores: dict[str, Array]
    drawn: dict[str, Array]
    tasks: tuple[str, ...] = ()  # titles whose scores are there, too, each under `task:TITLE`

    @property
    def has_points(self) -> bool:
        """Whether any run of the method has finished: the base alone is no point of it."""
        return len(self.ids) > 1

    @property
    def num_points(self) -> int:
        """Points without the base."""
        return len(self.ids) - 1

    def of(self, point: str) -> tuple[Array, Array]:
        """One point's speciality, [1] and [D]."""
        index = self.ids.index(point)
        return self.scores["speciality"][:, index], self.drawn["speciality"][:, index]


def match_methods(
    bootstrap: Bootstrap,
    methods: Mapping[str, Sequence[Point]],
    reference: str,
    masked: Sequence[str] = (),
    controls: Sequence[str] = (),
) -> dict[str, Any]:
    """Every method's points and frontier, and its versatility against the reference's at matched speciality.

    The speciality is matched at the points of the reference's frontier, and at the highest that every method with a
    finished run reaches.
    In every draw the items are resampled (and, where there are several, the seeds), the same for all methods; the level
    is the anchoring point's own speciality in that draw, and all frontiers are taken again.

    Args:
        bootstrap: its first model is the base.
        methods: name → its points, each with as many models as there are seeds; a method may have none.
        masked, controls: methods under the soft mask, and those that stand in for it. Each of the former is held
            against each of the latter too, on the control's frontier: what the mask does is its difference to these.

    Returns:
        `base`, `points`, `frontiers`, `matched` and `against_controls`, as JSON takes them; points and rows with each
        task's own score and change, too.
    """
    seeds = max((len(p.models) for points in methods.values() for p in points), default=1)
    weights = seed_weights(seeds, DRAWS, SEED)
    curves = {name: _curve(bootstrap, points, weights) for name, points in methods.items()}
    return {
        BASE: _figures(bootstrap, (0,) * seeds),
        "points": [
            entry
            for name, points in methods.items()
            for entry in _points(bootstrap, name, points, curves[name], weights)
        ],
        "frontiers": {name: _frontier(curve) for name, curve in curves.items()},
        "matched": _matched(curves, reference),
        "against_controls": [
            {"control": name, "matched": _matched({m: curves[m] for m in (name, *masked)}, name)}
            for name in controls
            if masked
        ],
    }


def _matched(curves: Mapping[str, _Curve], reference: str) -> list[dict[str, object]]:
    """Every level at which these methods are held against one of them; none where that one has no finished run."""
    anchors = _anchors(curves, reference) if curves[reference].has_points else []
    return [_level(curves, reference, *anchor, levels=len(anchors)) for anchor in anchors]


def _curve(bootstrap: Bootstrap, points: Sequence[Point], weights: Array) -> _Curve:
    seeds = weights.shape[1]
    models = np.array([(0,) * seeds, *(p.models for p in points)])  # [P, S]
    scores, drawn = {}, {}
    for name in ("speciality", *COMPARED):
        if (result := bootstrap.draws(name)) is None:
            continue
        values, draws = result
        scores[name] = values[models].mean(axis=1)[None]
        drawn[name] = np.einsum("dps,ds->dp", draws[:, models], weights)
    titles = tuple(bootstrap.tasks)
    for title in titles:
        values, draws = bootstrap.task_draws(title)
        scores[TASK + title] = values[models].mean(axis=1)[None]
        drawn[TASK + title] = np.einsum("dps,ds->dp", draws[:, models], weights)
    return _Curve((BASE, *(p.id for p in points)), scores, drawn, titles)


def _points(
    bootstrap: Bootstrap, method: str, points: Sequence[Point], curve: _Curve, weights: Array
) -> list[dict[str, object]]:
    own = {curve.ids[index] for index in frontier(curve.scores["speciality"][0], curve.scores["versatility"][0])}
    beaten = dominated_by(curve.scores["speciality"][0], curve.scores["versatility"][0])
    entries = []
    for index, point in enumerate(points, start=1):
        by = beaten[index]
        change = {
            name: _interval(curve.scores[name][0, index] - curve.scores[name][0, 0], drawn[:, index] - drawn[:, 0])
            for name, drawn in curve.drawn.items()
            if not name.startswith(TASK)
        }
        tasks = {
            title: {"score": float(curve.scores[TASK + title][0, index])}
            | _interval(
                curve.scores[TASK + title][0, index] - curve.scores[TASK + title][0, 0],
                curve.drawn[TASK + title][:, index] - curve.drawn[TASK + title][:, 0],
            )
            for title in curve.tasks
        }
        entries.append(
            {"id": point.id, "method": method, "learning_rate": point.learning_rate, "alpha": point.alpha}
            | {"seeds": len(point.models), "scores": _figures(bootstrap, point.models), "change": change}
            | {"tasks": tasks}
            | {"on_frontier": point.id in own, "dominated_by": None if by is None else curve.ids[by]}
        )
    return entries


def _figures(bootstrap: Bootstrap, models: tuple[int, ...]) -> dict[str, float | None]:
    """The mean over seeds of every summary score."""
    results = {name: bootstrap.draws(name) for name in SUMMARIES}
    return {n: None if d is None else float(d[0][list(models)].mean()) for n, d in results.items()}


def _frontier(curve: _Curve) -> list[str]:
    return [curve.ids[i] for i in frontier(curve.scores["speciality"][0], curve.scores["versatility"][0])]


def _anchors(curves: Mapping[str, _Curve], reference: str) -> list[tuple[str, str, str]]:
    """Where speciality is matched: method, point, and why there; ascending, none twice."""
    base = curves[reference].of(BASE)[0]
    results = [
        (reference, point, f"a point of {reference}'s frontier")
        for point in _frontier(curves[reference])
        if curves[reference].of(point)[0] > base
    ]
    tops = {
        name: curve.ids[int(curve.scores["speciality"][0].argmax())]
        for name, curve in curves.items()
        if curve.has_points  # the base as its top would take the common level from all the others
    }
    least = min(tops, key=lambda name: float(curves[name].of(tops[name])[0][0]))
    level = curves[least].of(tops[least])[0]
    if level > base and all(level != curves[m].of(p)[0] for m, p, _ in results):
        results.append((least, tops[least], "the highest that every method with a finished run reaches"))
    return sorted(results, key=lambda anchor: float(curves[anchor[0]].of(anchor[1])[0][0]))


def _level(
    curves: Mapping[str, _Curve], reference: str, method: str, point: str, why: str, *, levels: int
) -> dict[str, object]:
    level, drawn = curves[method].of(point)
    yardstick, theirs = at_level(curves[reference].scores, level), at_level(curves[reference].drawn, drawn)
    rows = {}
    for name, curve in curves.items():
        own, draws = at_level(curve.scores, level), at_level(curve.drawn, drawn)
        reason = _outside(name, curve, float(level[0]))
        row: dict[str, object] = {"reason": reason, "between": None}
        by_task: dict[str, dict[str, object]] = {}
        if reason is None:
            left, right, weight = place(curve.scores["speciality"], curve.scores["versatility"], level)
            row["between"] = [curve.ids[left[0]], curve.ids[right[0]]]
            row["weight"] = float(weight[0])
        row["tasks"] = by_task
        for score in (s for s in (*COMPARED, *(TASK + title for title in curve.tasks)) if s in own):
            value = None if reason else float(own[score][0])
            against = reason or _outside(reference, curves[reference], float(level[0]))
            to_base = (
                None
                if reason
                else _inside(own[score] - curve.scores[score][:, 0], draws[score] - curve.drawn[score][:, 0])
            )
            to_reference = (
                None
                if against or name == reference
                else _inside(own[score] - yardstick[score], draws[score] - theirs[score], levels)
            )
            if to_reference is not None and curve.num_points != curves[reference].num_points:
                to_reference |= _equally_many(curve, curves[reference], score, level, drawn, levels)
            results = {"": value, f"_against_{BASE}": to_base, "_against_reference": to_reference}
            if score.startswith(TASK):
                by_task[score.removeprefix(TASK)] = {(k or "_score")[1:]: v for k, v in results.items()}
            else:
                row |= {f"{score}{k}": v for k, v in results.items()}
        rows[name] = row
    return {"speciality": float(level[0]), "method": method, "point": point, "why": why, "rows": rows}


def _equally_many(
    curve: _Curve, reference: _Curve, score: str, level: Array, drawn: Array, levels: int
) -> dict[str, object]:
    """The difference where both frontiers have as many points as the poorer one, so that both are equally lucky."""
    size = min(curve.num_points, reference.num_points)
    sides = []
    for one in (curve, reference):
        highest = 1 + int(one.scores["speciality"][0, 1:].argmax())
        for scores, at in ((one.scores, level), (one.drawn, drawn)):
            needed = {name: scores[name] for name in {"speciality", "versatility", score}}
            sides.append(at_level_of_fewer(needed, at, size, highest, SEED)[score])
    own, draws, yardstick, theirs = sides
    return {"with_equal_points": {"points": size} | _inside(own - yardstick, draws - theirs, levels)}


def _outside(name: str, curve: _Curve, level: float) -> str | None:
    """Why a method says nothing at this level; None where it does."""
    speciality = curve.scores["speciality"][0]
    if not curve.has_points:
        return f"{name} has no finished run"
    if level > speciality.max():
        return f"{name} reaches a speciality of {speciality.max():.1f} at most"
    if level < speciality.min():
        return f"{name} has no point with a speciality below {speciality.min():.1f}"
    return None


def _inside(value: Array, drawn: Array, levels: int = 1) -> dict[str, object]:
    """A difference with its interval, from the draws in which both methods have the level in their range.

    Where a method is looked at on several levels at once, a corrected interval stands beside it, which holds on all of
    them in 95 % of cases (Bonferroni): one of five intervals of equal methods leaves out 0 far more often than 5 %.
    """
    inside = np.isfinite(drawn)
    share = float(inside.mean())
    message: dict[str, object] = {
        "value": float(value[0]),
        "low": None,
        "high": None,
        "draws_inside": share,
        "reason": None,
    }
    if share >= ENOUGH_DRAWS:
        message |= _interval(float(value[0]), drawn[inside])
        if levels > 1:
            corrected = estimate(float(value[0]), drawn[inside], 1 - (1 - CONFIDENCE) / levels)
            message |= {"low_corrected": corrected.low, "high_corrected": corrected.high}
    else:
        message["reason"] = f"the speciality lies inside of the points' range in {100 * share:.0f} % of the draws only"
    return message


def _interval(value: float, drawn: Array) -> dict[str, float]:
    return asdict(estimate(float(value), drawn))
