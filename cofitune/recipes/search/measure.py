"""What a search measures its trials by: losses and drift, or the scores of an evaluation; and on which items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cofitune.config import schema
from cofitune.config.schema import Config
from cofitune.errors import ConfigError
from cofitune.recipes.from_config import tasks_by_category
from cofitune.recipes.train.rehearsal import rehearsal_folder
from cofitune.rehearsal.items import MANIFEST, read_rehearsal

Kind = Literal["loss", "score"]
WITH_ANSWER = ("generate", "loss", "multiple_choice")  # kinds of tasks whose items say what a right answer is


@dataclass(frozen=True)
class Measure:
    """What trials are compared by.

    Attributes:
        why: what decided for it, in words; empty where the config asks for scores.
        tasks: what a trial is asked, limits applied: all tasks of an evaluation; or those that losses are taken on.
        section: where they stand in the config.
        limit: items of each task, and of data.validation; None: all.
        validation: whether the speciality loss is taken on data.validation instead of tasks.
        unused: titles of tasks that a measure by losses asks nothing of.
    """

    kind: Kind
    why: str
    tasks: schema.Eval
    section: str
    limit: int | None
    validation: bool = False
    unused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it before the first trial."""
        if self.kind == "score":
            return (f"measure: score, since {self.why}",) if self.why else ()
        on = "data.validation" if self.validation else f"{self.section}.speciality"
        notes = [f"measure: loss, since {self.why}; the speciality loss is that of the answers in {on}"]
        if self.limit:
            notes.append(f"measure: loss takes at most {self.limit} items of each, by search.limit")
        if self.unused:
            notes.append(f"measure: loss asks nothing of {', '.join(self.unused)}, which would need generated answers")
        return tuple(notes)


def choose_measure(config: Config) -> Measure:
    """Take what `search.measure` says; without it losses, where there is what they need.

    Raises:
        ConfigError: measure: loss is asked for, and something that it needs is missing; it says what.
    """
    requested = config.search.measure
    asked = config.search.eval or config.eval
    # a test set is no stand-in where data.validation is given
    speciality = () if config.search.eval is None and config.data.validation else _answered(asked.speciality)
    answers = _place(config.train, config.run)
    problem = _why_no_losses(config.search.objective, config.train, answers, config.rehearsal.held_out)
    if not problem and not speciality and not config.data.validation:
        problem = "neither a task of speciality with right answers nor data.validation says what is to be learnt"
    if requested == "loss" and problem:
        raise ConfigError([f"search.measure: loss cannot be taken: {problem}"])
    section = "eval" if config.search.eval is None else "search.eval"
    kind: Kind = "score" if requested == "score" or (requested is None and problem) else "loss"
    limit = config.search.items_for(kind)
    tasks = _limited(asked, limit)
    if kind == "score":
        return Measure("score", "" if requested else problem, tasks, section, limit)
    why = "search.measure says so" if requested else f"{answers} holds out answers to measure drift on"
    validation = not speciality
    loss_tasks = _with_answers(tasks, no_speciality=validation)
    kept = {task.title for group in tasks_by_category(loss_tasks).values() for task in group}
    unused = [t.title for group in tasks_by_category(tasks).values() for t in group if t.title not in kept]
    return Measure("loss", why, loss_tasks, section, limit, validation, tuple(unused))


def _why_no_losses(objective: str, train: schema.Train, folder: Path, held_out: float) -> str:
    """What a measure of drift lacks, in words; empty where it lacks nothing.

    Args:
        folder: of the rehearsal whose held-out answers drift is measured on.
        held_out: `rehearsal.held_out`, by which it is yet to be made.
    """
    if objective != "unified":
        return f"search.objective: {objective} ranks by scores"
    if train.rehearsal is None and train.drift_data is None:
        return "there are no held-out answers of the base to measure drift on (train.rehearsal or train.drift_data)"
    if not (folder / MANIFEST).is_file():  # it is still to be made
        if held_out == 0:
            return f"rehearsal.held_out: 0 leaves no answer in {folder} to measure drift on"
    elif not read_rehearsal(folder).of(held_out=True):
        return f"{folder} holds out no answer to measure drift on (rehearsal.held_out)"
    return ""


def _place(train: schema.Train, run: Path) -> Path:
    """The folder of the rehearsal whose held-out answers drift is measured on."""
    return Path(train.drift_data) if train.drift_data else rehearsal_folder(train, run)


def _limited(given: schema.Eval, most: int | None) -> schema.Eval:
    """The tasks with at most `most` items each, as `search.limit` says; no model beside the run."""

    def limited(tasks: tuple[schema.Task, ...]) -> tuple[schema.Task, ...]:
        if most is None:
            return tasks
        return tuple(task.model_copy(update={"limit": min(given.limit or task.limit or most, most)}) for task in tasks)

    parts = {name: limited(getattr(given.versatility, name)) for name in schema.Versatility.model_fields}
    versatility = given.versatility.model_copy(update=parts)
    update: dict[str, object] = {"speciality": limited(given.speciality), "versatility": versatility}
    update["models"] = ()  # those beside the run are none of the search's
    update["engine"] = "transformers"  # a trial is asked in memory
    if most is not None:
        update["limit"] = None  # each task has its own now
    return given.model_copy(update=update)


def _with_answers(tasks: schema.Eval, no_speciality: bool) -> schema.Eval:
    """What losses can be taken on: right answers of the speciality, and choices of gen_kn and gen_rs."""
    given = tasks.versatility
    choices = {n: _answered(getattr(given, n), ("multiple_choice",)) for n in schema.Versatility.model_fields}
    update = {
        "speciality": () if no_speciality else _answered(tasks.speciality),
        "versatility": given.model_copy(update=choices),
        "drift": (),
    }
    return tasks.model_copy(update=update)


def _answered(tasks: Iterable[schema.Task], kinds: tuple[str, ...] = WITH_ANSWER) -> tuple[schema.Task, ...]:
    return tuple(task for task in tasks if task.kind in kinds)
