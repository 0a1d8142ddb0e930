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
        validation: whether the speciality loss is taken on data.validation instead of tasks.
        unused: titles of tasks that a measure by losses asks nothing of.
    """

    kind: Kind
    why: str
    tasks: schema.Eval
    section: str
    validation: bool = False
    unused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it before the first trial."""
        if self.kind == "score":
            return (f"measure: score, since {self.why}",) if self.why else ()
        on = "data.validation" if self.validation else f"{self.section}.speciality"
        notes = [f"measure: loss, since {self.why}; the speciality loss is that of the answers in {on}"]
        if self.unused:
            notes.append(f"measure: loss asks nothing of {', '.join(self.unused)}, which would need generated answers")
        return tuple(notes)


def choose_measure(config: Config) -> Measure:
    """Take what `search.measure` says; without it losses, where there is what they need.

    Raises:
        ConfigError: measure: loss is asked for, and something that it needs is missing; it says what.
    """
    requested = config.search.measure
    problem = _why_no_losses(config)
    if requested == "loss" and problem:
        raise ConfigError([f"search.measure: loss cannot be taken: {problem}"])
    tasks, section = _limited(config), "eval" if config.search.eval is None else "search.eval"
    if requested == "score" or (requested is None and problem):
        return Measure("score", "" if requested else problem, tasks, section)
    why = "search.measure says so" if requested else f"{_place(config)} holds out answers to measure drift on"
    validation = not _speciality(config, tasks)
    loss_tasks = _with_answers(tasks, no_speciality=validation)
    kept = {task.title for group in tasks_by_category(loss_tasks).values() for task in group}
    unused = [t.title for group in tasks_by_category(tasks).values() for t in group if t.title not in kept]
    return Measure("loss", why, loss_tasks, section, validation, tuple(unused))


def _why_no_losses(config: Config) -> str:
    """What a measure by losses lacks, in words; empty where it lacks nothing."""
    train = config.train
    if config.search.objective != "unified":
        return f"search.objective: {config.search.objective} ranks by scores"
    if train.rehearsal is None and train.drift_data is None:
        return "there are no held-out answers of the base to measure drift on (train.rehearsal or train.drift_data)"
    folder = _place(config)
    if not (folder / MANIFEST).is_file():  # it is still to be made
        if config.rehearsal.held_out == 0:
            return f"rehearsal.held_out: 0 leaves no answer in {folder} to measure drift on"
    elif not _holds_out(config):
        return f"{folder} holds out no answer to measure drift on (rehearsal.held_out)"
    if not _speciality(config, _limited(config)) and not config.data.validation:
        return "neither a task of speciality with right answers nor data.validation says what is to be learnt"
    return ""


def _holds_out(config: Config) -> bool:
    return bool(read_rehearsal(_place(config)).of(held_out=True))


def _place(config: Config) -> Path:
    """The folder of the rehearsal whose held-out answers drift is measured on."""
    return Path(config.train.drift_data) if config.train.drift_data else rehearsal_folder(config.train, config.run)


def _limited(config: Config) -> schema.Eval:
    """The tasks of `search.eval`, or of `eval`, with at most `search.limit` items each; no model beside the run."""
    given, most = config.search.eval or config.eval, config.search.limit

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


def _speciality(config: Config, tasks: schema.Eval) -> tuple[schema.Task, ...]:
    """The speciality's tasks with right answers; a test set is no stand-in where data.validation is given."""
    if config.search.eval is None and config.data.validation:
        return ()
    return _answered(tasks.speciality)


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
