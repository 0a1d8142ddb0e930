"""The runs of a comparison that have ended, a line each in `runs.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

from cofitune.errors import ArtifactError
from cofitune.recipes.compare.plan import ComparePlan

STORE = "runs.jsonl"


def _read_store(plan: ComparePlan) -> dict[str, dict[str, Any]]:
    """Each run's last line, as far as it is still the same run; a run whose weights are gone is done no more.

    Raises:
        ArtifactError: a line is damaged.
    """
    path = plan.folder / STORE
    results: dict[str, dict[str, Any]] = {}
    identities = {run.name: run for run in plan.runs}
    *whole, _torn = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            run = identities.get(line["run"])
            same = run is not None and line["identity"] == run.identity
            if run is not None and same and (line["status"] != "done" or run.is_trained):
                results[run.name] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}:{number}: this line of the comparison's store is damaged: {error}") from None
    return results


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line and wait until it is on the disk; half a line that a killed process left is cut off first."""
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _mean_seconds(lines: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of each method's finished runs: the mean of each part, over the runs of which it is known."""
    taken: dict[str, dict[str, list[float]]] = {}
    for line in lines.values():
        if line["status"] == "done":
            for what, seconds in line["seconds"].items():
                taken.setdefault(line["method"], {}).setdefault(what, []).append(seconds)
    return {method: sum(map(mean, parts.values())) for method, parts in taken.items()}
