"""The files that the commands left in a run folder, as the report reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from cofitune.errors import ArtifactError
from cofitune.files import read_json
from cofitune.importance_file import read_vectors
from cofitune.jsonl import json_object, read_lines
from cofitune.reports.compare.content import Comparison
from cofitune.reports.evaluation.scores import Scores
from cofitune.reports.shape import Entry
from cofitune.search.store import read_trials
from cofitune.search.trial import BASE

T = TypeVar("T")
COMMANDS = ("search", "importance", "rehearsal", "train", "eval", "compare")


@dataclass(frozen=True)
class Artifacts:
    """What lies in a run's folder, as it was read; None or empty where it is not there.

    Attributes:
        metrics: the lines of train/metrics.jsonl.
        changed: model → `lost` and `gained` → the items.
        tree: the content of search/tree.json, or what trials.jsonl says of a search that has not ended.
        vectors: importance, each unit kind → [L, units].
        configs: command → the text of its config.yaml.
    """

    path: Path
    name: str
    scores: Scores | None = None
    compared: Comparison | None = None
    changed: Mapping[str, Mapping[str, Sequence[Entry]]] = field(default_factory=dict)
    tree: Entry | None = None
    vectors: dict[str, Tensor] | None = None
    importance: Entry | None = None
    manifest: Entry | None = None
    metrics: Sequence[Entry] = field(default_factory=list)
    configs: dict[str, str] = field(default_factory=dict)


def made_of(path: Path, make: Callable[[], T]) -> T:
    """Make a part of the page of an artifact, which may hold anything.

    Raises:
        ArtifactError: nothing can be made of it.
    """
    try:
        return make()
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        StopIteration,
        RecursionError,
    ) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise ArtifactError(
            f"{path}: is damaged, or of another version: no report can be made of what it holds ({what})"
        ) from error


def read_artifacts(path: Path, name: str) -> Artifacts:
    """Read all that a run has.

    Raises:
        ArtifactError: a file is damaged, or was written by another version in a form that we do not read.
    """
    scores_file, compared = path / "eval" / "scores.json", path / "compare" / "compare.json"
    scores = Scores.read(scores_file) if scores_file.is_file() else None
    vectors = None
    if importance := _json(path / "importance" / "manifest.json", "importance manifest"):
        vectors = read_vectors(path / "importance", importance)
    store = path / "search" / "trials.jsonl"
    texts = {command: path / command / "config.yaml" for command in COMMANDS}
    return Artifacts(
        path=path,
        name=name,
        scores=scores,
        compared=Comparison.read(compared) if compared.is_file() else None,
        changed=made_of(scores_file, lambda: _read_changed(path, scores)),
        tree=_json(path / "search" / "tree.json", "search tree") or made_of(store, partial(_unfinished_search, store)),
        vectors=vectors,
        importance=importance,
        manifest=_json(path / "train" / "manifest.json", "training manifest"),
        metrics=read_lines(path / "train" / "metrics.jsonl", json_object, may_be_torn=True),
        configs={c: made_of(file, partial(file.read_text, "utf-8")) for c, file in texts.items() if file.is_file()},
    )


def _json(path: Path, what: str) -> Entry | None:
    """Read one of ours, where it is there."""
    return read_json(path, what) if path.is_file() else None


def _read_changed(path: Path, scores: Scores | None) -> Mapping[str, Mapping[str, Sequence[Entry]]]:
    """The lost and gained items of each model, in the order of the table."""
    if scores is None:
        return {}
    folders = {model: path / "eval" / "changed" / model for model in scores.models}
    return {
        model: {
            part: read_lines(folder / f"{part}.jsonl", json_object, may_be_torn=False) for part in ("lost", "gained")
        }
        for model, folder in folders.items()
        if folder.is_dir()
    }


def _unfinished_search(store: Path) -> Entry | None:
    """A search that has not ended, as far as its store goes; None without one, or before its base is scored."""
    trials = {trial.id: json.loads(trial.to_json()) for trial in read_trials(store)}
    base = trials.pop(BASE, None)
    if base is None:
        return None
    reason = f"The search has not ended: {len(trials)} trials so far, and no winner."
    return {"base": base, "trials": list(trials.values()), "reason": reason}
