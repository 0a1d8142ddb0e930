"""All runs of a folder side by side, where they were asked the same items of the same base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cofitune.recipes.report.artifacts import Artifacts
from cofitune.reports.evaluation.plots import Point, frontier_picture, points_of
from cofitune.reports.evaluation.rows import change_cell
from cofitune.reports.evaluation.scores import Change, Scores
from cofitune.reports.figure import Picture
from cofitune.reports.html import Overview, OverviewRow, Run
from cofitune.reports.text import NONE

OWN = "run"  # the name that `eval` gives the config's own run
WORDS = ("trained", "steps", "loss (nats)")
CHANGES = ("speciality", "versatility", "instruct", "unified")


def make_overview(read: Sequence[Artifacts], runs: Sequence[Run], draws: bool) -> Overview:
    """The table over several runs, and the frontier where they can be compared."""
    rows = [
        OverviewRow(run.key, run.name, _words(artifacts), [change_cell(_change(artifacts, n)) for n in CHANGES])
        for artifacts, run in zip(read, runs, strict=True)
    ]
    scored = [a for a in read if a.scores is not None]
    alike = len({_asked(a.scores) for a in scored if a.scores is not None}) == 1
    if not scored:
        note = "None of them was evaluated."
    elif alike:
        note = "All that were evaluated answered the same items, and have the same base."
    else:
        note = "They were not asked the same items, or have another base: their figures cannot be compared."
    picture = _frontier(scored) if draws and alike and len(scored) > 1 else None
    return Overview(WORDS, CHANGES, rows, note, picture)


def _words(run: Artifacts) -> list[str]:
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    last = f"{losses[-1]:.4f}" if losses else NONE
    if run.manifest is None:
        return [NONE, f"{len(losses):,}, stopped" if losses else NONE, last]
    region = run.manifest["region"]
    share = 100 * region["trained_weights"] / region["all_weights"]
    return [f"{share:.1f} %", f"{run.manifest['steps']:,}", last]


def _change(run: Artifacts, name: str) -> Change | None:
    """The run's own change against its base."""
    own = run.scores.against_base.get(OWN) if run.scores else None
    return own.summary[name] if own else None


def _asked(scores: Scores) -> tuple[object, ...]:
    """What must be equal for two evaluations to stand side by side: the base, and the items of every task."""
    tasks = tuple((title, task.sha256, task.items, task.metric) for title, task in sorted(scores.tasks.items()))
    return scores.models[scores.base].fingerprint, scores.speciality_weight, tasks


def _frontier(scored: Sequence[Artifacts]) -> Picture | None:
    points: list[Point] = []
    for run in scored:
        if run.scores is None:
            continue
        results = {p.label: p for p in points_of(run.scores)}
        base = run.scores.base
        points += [results[base]] if not points and base in results else []
        if own := results.get(OWN):
            points.append(replace(own, label=run.name))
    if len(points) < 2 or scored[0].scores is None:
        return None
    return frontier_picture("runs", points, scored[0].scores.speciality_weight)
