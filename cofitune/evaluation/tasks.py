"""The tasks of an evaluation, each with its items: what is asked, how it is scored. Read before weights load."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cofitune.errors import ArtifactError, UserError
from cofitune.evaluation.ifeval import require_harness
from cofitune.evaluation.items import EvalItem, EvalTask, LoadedTask, read_items
from cofitune.evaluation.metrics import METRICS
from cofitune.files import sha256_file
from cofitune.rehearsal.items import MANIFEST, read_rehearsal

CATEGORIES = ("speciality", "gen_kn", "gen_rs", "instruct", "drift")
MOST_BYTES = 200  # of a name: file systems allow 255, and suffixes come behind it
_TITLE = re.compile(r"^\w[\w .+-]*$")  # it also names a file


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
    return bool(_TITLE.fullmatch(name)) and len(name.encode()) <= MOST_BYTES


def _check_task(task: EvalTask) -> None:
    where = f"eval.{task.category}: task '{task.title}'"
    if not is_title(task.title):
        raise UserError(
            f"{where}: a name is made of letters, digits, spaces and . _ + - (it also names a file), and has at most "
            f"{MOST_BYTES} bytes"
        )
    if task.pattern is None:
        return
    try:
        groups = re.compile(task.pattern).groups
    except re.error as error:
        raise UserError(f"{where}: pattern {task.pattern!r} is no regular expression: {error}") from None
    if groups == 0:
        raise UserError(f"{where}: pattern {task.pattern!r} has no group; put what is compared in parentheses")


def lacking_rehearsal(task: EvalTask) -> ArtifactError | None:
    """What is to be said where a task of drift waits for `cofitune rehearse`; None where it does not."""
    if task.kind != "drift" or (Path(task.path) / MANIFEST).is_file():
        return None
    return ArtifactError(
        f"eval.drift: no rehearsal in {task.path}; run `cofitune rehearse` with this config first, name the folder of "
        "another one, or take it out of eval.drift"
    )


def load_drift(task: EvalTask) -> LoadedTask:
    """The held-out items of a rehearsal as a task.

    Raises:
        ArtifactError: the folder is no rehearsal, or holds out no item.
    """
    lacking = lacking_rehearsal(task)
    if lacking:
        raise lacking
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
        read = read_items(task)
        return LoadedTask(
            task, read.items, sha256_file(Path(task.path)), METRICS[task.metric], read.unusable, read.unread
        )
    from cofitune.evaluation.harness.tasks import load_harness

    result = load_harness(task)
    return LoadedTask(task, result.items, result.sha256, result.metric, harness=result.tasks)
