"""One task's result on the disk: an item a line, and the figures beside, written last: with them the task is done."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cofitune.errors import ArtifactError
from cofitune.evaluation.metrics import Metric
from cofitune.files import read_json, sha256_file, write_checked_json, write_text


@dataclass(frozen=True)
class Sample:
    """What became of one item; paired statistics need nothing else.

    Attributes:
        line: its line in the task's file, from 1; for a task of the harness, its place in the data set, from 1.
        prompt: the text that the model saw, template included.
        reference: what is right.
        answer: the generated text, or None for a multiple choice.
        log_likelihoods: one a choice (nats, summed over its tokens), or None for a generated answer.
        pick: index of the choice that the model prefers, or None.
        score: what the task's metric says of this item: 1 right, 0 wrong, a share in between, or nats.
    """

    line: int
    prompt: str
    reference: object
    answer: str | None
    log_likelihoods: tuple[float, ...] | None
    pick: int | None
    score: float

    def as_dict(self) -> dict[str, object]:
        """The fields that say something, as JSON takes them."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class TaskResult:
    """One task's result.

    Attributes:
        raw: the mean of the samples' scores, in the metric's unit.
        chance: what guessing gives, 0 to 1.
        others: further figures of the task, by name, shown beside and in no mean.
        seconds: wall time.
    """

    title: str
    category: str
    metric: Metric
    raw: float
    chance: float
    samples: tuple[Sample, ...]
    seconds: float
    others: dict[str, float] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """How many items were asked."""
        return len(self.samples)

    @property
    def are_numbers(self) -> bool:
        """Whether all log-likelihoods are: weights that overflowed in training give none."""
        return all(math.isfinite(value) for sample in self.samples for value in sample.log_likelihoods or ())


def save_result(result: TaskResult, path: Path) -> None:
    """Write the samples to `path` (.jsonl) and the figures beside it (.json), which mark the task as done."""
    lines = [json.dumps(s.as_dict(), ensure_ascii=False) + "\n" for s in result.samples]
    path.with_suffix(".json").unlink(missing_ok=True)
    write_text(path, "".join(lines))
    figures = {k: v for k, v in asdict(result).items() if k != "samples"}
    write_checked_json(path.with_suffix(".json"), figures | {"samples_sha256": sha256_file(path)})


def load_result(path: Path) -> TaskResult | None:
    """Read what `save_result` wrote; None where the task was not finished.

    Raises:
        ArtifactError: the samples are not those that the figures were made of, or a file is damaged.
    """
    if not path.with_suffix(".json").is_file():
        return None
    figures = read_json(path.with_suffix(".json"), "task result")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content).hexdigest() != figures.pop("samples_sha256", None):
        raise ArtifactError(f"{path}: changed since it was written; delete it, or use --overwrite")
    try:
        samples = tuple(_sample(json.loads(line)) for line in content.decode("utf-8").split("\n") if line)
        return TaskResult(**figures | {"metric": Metric(**figures["metric"]), "samples": samples})
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: this task result is damaged: {error}") from None


def _sample(values: dict[str, Any]) -> Sample:
    if values.get("log_likelihoods") is not None:
        values["log_likelihoods"] = tuple(values["log_likelihoods"])
    filled: dict[str, Any] = {f.name: values.get(f.name) for f in fields(Sample)}
    return Sample(**filled)
