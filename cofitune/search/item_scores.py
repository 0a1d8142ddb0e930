"""Which trials cannot be told apart: what each scored on every item, kept small, and paired differences of it.

All trials answer the same items, so the difference of two is known better than either of them (evaluation/paired.py).
The intervals are not corrected for the winner being the best of many: it is flattered a little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cofitune.errors import ArtifactError
from cofitune.evaluation.metrics import Metric
from cofitune.evaluation.samples import TaskResult, load_result
from cofitune.evaluation.statistics.comparison import content
from cofitune.evaluation.statistics.paired import Bootstrap, Estimate, TaskItems
from cofitune.files import read_json, write_checked_json

Difference = Estimate


@dataclass(frozen=True)
class ItemScores:
    """What one trial scored on each of a task's items.

    Attributes:
        asked: hash of all items, in order: prompts and right answers.
        scores: one an item, in the metric's unit.
    """

    category: str
    metric: Metric
    chance: float
    asked: str
    scores: tuple[float, ...]


Answers = Mapping[str, ItemScores]  # by the task's title


class KeptAnswers:
    """The folder with one small file for each trial and step; it outlives the trials' own folders."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, Answers | None] = {}

    def keep(self, trial: str, steps: int, samples: Path) -> None:
        """Take what is needed from a folder of samples, one file a task.

        Raises:
            ArtifactError: a file of samples is damaged.
        """
        found = (load_result(path) for path in sorted(samples.glob("*.jsonl")))
        answers = {result.title: _item_scores(result) for result in found if result is not None}
        if answers:
            path = self._path(trial, steps)
            write_checked_json(path, {title: asdict(scores) for title, scores in answers.items()})
            self._read[path] = answers

    def get(self, trial: str, steps: int) -> Answers | None:
        """A trial's answers at a step; None where none were kept.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = self._path(trial, steps)
        if path not in self._read:
            self._read[path] = _answers(path) if path.exists() else None
        return self._read[path]

    def _path(self, trial: str, steps: int) -> Path:
        return self._folder / f"{trial}-{steps:06d}.json"


def difference(score: str, first: Answers | None, second: Answers | None, weight: float) -> Difference | None:
    """A summary score (`SUMMARIES`) of the first minus that of the second, with its 95 % interval; paired.

    Args:
        weight: w in unified = w·speciality + (1 − w)·versatility.

    Returns:
        None where answers are missing, were asked of other items, or hold no task of this score.
    """
    if first is None or second is None or _asked(first) != _asked(second):
        return None
    # two at a time, so that an interval does not change as further trials come
    tasks = {title: _side_by_side(scores, second[title]) for title, scores in first.items()}
    return Bootstrap(tasks, weight).change(score, 0, 1)


def _item_scores(result: TaskResult) -> ItemScores:
    asked = hashlib.sha256("".join(content(sample) for sample in result.samples).encode()).hexdigest()
    scores = tuple(float(sample.score) for sample in result.samples)
    return ItemScores(result.category, result.metric, result.chance, asked, scores)


def _answers(path: Path) -> Answers:
    content_of_file = read_json(path, "file of a trial's item scores")
    try:
        return {title: _from_json(fields) for title, fields in content_of_file.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{path}: this file of a trial's item scores is damaged: {error}") from None


def _from_json(fields: Mapping[str, Any]) -> ItemScores:
    parts = {"metric": Metric(**fields["metric"]), "scores": tuple(map(float, fields["scores"]))}
    return ItemScores(**{**fields, **parts})


def _asked(answers: Answers) -> dict[str, tuple[str, int]]:
    return {title: (scores.asked, len(scores.scores)) for title, scores in answers.items()}


def _side_by_side(first: ItemScores, second: ItemScores) -> TaskItems:
    return TaskItems(first.category, first.metric, first.chance, np.array([first.scores, second.scores]))
