"""The runs of a comparison that have ended, a line each in `runs.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TypedDict

from cofitune.jsonl import json_object, read_lines
from cofitune.recipes.compare.plan import ComparePlan

STORE = "runs.jsonl"


class RunLine(TypedDict):
    """What `runs.jsonl` says of a run that has ended.

    Attributes:
        identity: what the run depends on; another one is another run, whatever its name.
        status: done or failed.
        reason: why it failed.
        seconds: wall time of `train` and of `evaluate`, where they ran.
    """

    run: str
    method: str
    learning_rate: float
    seed: int
    identity: object
    status: str
    reason: str | None
    seconds: dict[str, float]


def read_store(plan: ComparePlan) -> dict[str, RunLine]:
    """Each run's last line, as far as it is still the same run; a run whose weights are gone is done no more.

    Raises:
        ArtifactError: a line is damaged.
    """
    results: dict[str, RunLine] = {}
    runs = {run.name: run for run in plan.runs}
    for line in read_lines(plan.folder / STORE, _line, may_be_torn=True, what="line of the comparison's store"):
        run = runs.get(line["run"])
        if run is not None and line["identity"] == run.identity and (line["status"] != "done" or run.is_trained):
            results[run.name] = line
    return results


def mean_seconds(lines: Mapping[str, RunLine]) -> dict[str, float]:
    """Seconds of each method's finished runs: the mean of each part, over the runs of which it is known."""
    taken: dict[str, dict[str, list[float]]] = {}
    for line in lines.values():
        if line["status"] == "done":
            for what, seconds in line["seconds"].items():
                taken.setdefault(line["method"], {}).setdefault(what, []).append(seconds)
    return {method: sum(map(mean, parts.values())) for method, parts in taken.items()}


def _line(text: str) -> RunLine:
    line = json_object(text)
    if lacking := [name for name in RunLine.__annotations__ if name not in line]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    return RunLine(**line)  # type: ignore[typeddict-item, no-any-return]
