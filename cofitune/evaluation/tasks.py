"""The tasks of an evaluation, each with its items: what is asked, how it is scored. Read before weights load."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofitune.errors import ArtifactError, UserError
from cofitune.evaluation.ifeval import require_harness
from cofitune.evaluation.items import EvalItem, EvalTask, read_items
from cofitune.evaluation.metrics import METRICS, Metric
from cofitune.files import sha256_file
from cofitune.rehearsal.items import Rehearsal, read_rehearsal

CATEGORIES = ("speciality", "gen_kn", "gen_rs", "instruct", "drift")
_TITLE = re.compile(r"^\w[\w .+-]*$")  # it also names a file


@dataclass(frozen=True)
class LoadedTask:
    """A task with its items.

    Attributes:
        sha256: hash of its file, or of a harness task's settings and items.
        metric: what its figure means.
        unusable: lines of the items that cannot be asked or judged, and were left out as `on_bad_item` says.
        left_out: lines of the items that do not fit into the model, as `fit_lengths` found.
        cut: lines of a harness task's items whose prompts the harness cuts from the left to make them fit, likewise.
        too_long: lines of the items whose right answer is longer than an answer may be, likewise; they stay in.
        longest: tokens of the longest prompt, likewise; 0 before.
        asked_sha256: hash of all prompts and given answers as the model sees them, likewise; empty before.
        harness: the harness's own task objects, several for a group; none for a file's task.
        rehearsal: of kind drift, the rehearsal whose held-out items these are; else None.
    """

    task: EvalTask
    items: tuple[EvalItem, ...]
    sha256: str
    metric: Metric
    unusable: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    longest: int = 0
    asked_sha256: str = ""
    harness: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    rehearsal: Rehearsal | None = field(default=None, compare=False, repr=False)

    @property
    def chance(self) -> float:
        """The share of right answers that guessing gives: the mean of 1/choices, 0 where there is nothing to pick."""
        return sum(1 / len(item.choices) for item in self.items if item.choices) / len(self.items)


def load_tasks(tasks: Iterable[EvalTask]) -> tuple[LoadedTask, ...]:
    """Read every task's items.

    Raises:
        UserError: two tasks have one title, a title that cannot name a file, or a pattern that cannot be used; IFEval's
            packages or NLTK's table are missing.
        DataError: a file is missing or empty, or an item cannot be used (file:line).
    """
    require_harness()
    tasks = tuple(tasks)
    seen: dict[str, EvalTask] = {}
    for task in tasks:
        _check_task(task)
        other = seen.setdefault(task.title.lower(), task)  # two file names may not differ by case only
        if other is not task:
            raise UserError(
                f"eval: two tasks are called '{task.title}' ({other.path} and {task.path}); name: each apart"
            )
    return tuple(_load(task) for task in tasks)


def is_title(name: str) -> bool:
    """Whether a name can stand in tables and name a file."""
    return bool(_TITLE.match(name))


def _check_task(task: EvalTask) -> None:
    where = f"eval.{task.category}: task '{task.title}'"
    if not is_title(task.title):
        raise UserError(f"{where}: a name is made of letters, digits, spaces and . _ + - (it also names a file)")
    if task.pattern is None:
        return
    try:
        groups = re.compile(task.pattern).groups
    except re.error as error:
        raise UserError(f"{where}: pattern {task.pattern!r} is no regular expression: {error}") from None
    if groups == 0:
        raise UserError(f"{where}: pattern {task.pattern!r} has no group; put what is compared in parentheses")


def load_drift(task: EvalTask) -> LoadedTask:
    """The held-out items of a rehearsal as a task.

    Raises:
        ArtifactError: the folder is no rehearsal, or holds out no item.
    """
    rehearsal = read_rehearsal(Path(task.path))
    if task.metric == "kl" and not rehearsal.top_k:
        raise ArtifactError(
            f"{task.path}: holds no probabilities for metric: kl; make it with rehearsal.top_k above 0, or use metric: "
            "drift"
        )
    places = rehearsal.of(held_out=True)[: task.limit]
    if not places:
        raise ArtifactError(
            f"{task.path}: holds out no item to measure drift on; make it with rehearsal.held_out above 0"
        )
    items = tuple(
        EvalItem(place + 1, item.messages[-1]["content"], references=(item.answer,))
        for place, item in ((place, rehearsal.items[place]) for place in places)
    )
    return LoadedTask(task, items, rehearsal.sha256, METRICS[task.metric], rehearsal=rehearsal)


def _load(task: EvalTask) -> LoadedTask:
    if task.kind == "drift":
        return load_drift(task)
    if task.kind != "harness":
        items, unusable = read_items(task)
        return LoadedTask(task, items, sha256_file(Path(task.path)), METRICS[task.metric], unusable)
    from cofitune.evaluation.harness.tasks import load_harness

    found = load_harness(task)
    return LoadedTask(task, found.items, found.sha256, found.metric, harness=found.tasks)
