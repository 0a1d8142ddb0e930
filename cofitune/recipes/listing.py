"""`cofitune list`: the names that a config may use, each with a few words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast, get_args

from cofitune.config.eval import Task
from cofitune.config.shipped import ALIASES, FOLDERS, TEMPLATES, Kind, say_first_words, shipped_folder, shipped_names
from cofitune.errors import UserError, did_you_mean, install
from cofitune.evaluation.harness.task_index import task_index
from cofitune.model.layouts import FAMILIES, LAYOUTS

What = Literal["models", "methods", "suites", "tasks", "templates"]
USED = {
    "models": "model.name takes any model of these layouts, also others by model.anatomy; a folder or a hub name",
    "methods": "compare.methods=[full,lora,cofitune], or NAME → a YAML file",
    "suites": "eval.suite=quick eval.data=FOLDER, or a YAML file",
    "tasks": "a task of eval is {path: FILE, kind: KIND}, or {harness: NAME}; `cofitune list tasks WORD` names the "
    "harness's tasks with this word",
    "templates": "cofitune init --template 7b --data FILE",
}
KINDS = {
    "multiple_choice": "{question, choices, answer}",
    "generate": "{question or instruction, answers or output}",
    "loss": "any training format; nats, lower is better",
    "ifeval": "IFEval's own fields; the harness's verifiers judge",
    "drift": "path is a folder of `cofitune rehearse`; nats from the base",
}


def as_what(text: str) -> What:
    """The list that is asked for.

    Raises:
        UserError: there is none of this name.
    """
    for what in get_args(What):
        if text == what:
            return cast(What, what)
    raise UserError(f"list {text}: no such list{did_you_mean(text, get_args(What))} (there are: {', '.join(USED)})")


def list_names(what: What, word: str | None = None) -> list[tuple[str, str]]:
    """Names and what is to be said of each.

    Args:
        word: of tasks: those of lm-evaluation-harness whose names hold it.

    Raises:
        UserError: a word for what is no list of tasks; a word that no task holds; the harness is not installed.
    """
    if word is not None:
        if what != "tasks":
            raise UserError(f"list {what} {word}: a word is for `cofitune list tasks WORD`; leave it out")
        return _harness_tasks(word)
    if what == "models":
        return [(name, f"{FAMILIES[name]}; modules {', '.join(LAYOUTS[name].modules)}") for name in LAYOUTS]
    if what == "tasks":
        return [(kind, f"{KINDS[kind]}; metrics {', '.join(metrics)}") for kind, metrics in Task.METRICS.items()]
    if what == "templates":
        return list(TEMPLATES.items())
    return list(_files("method" if what == "methods" else "suite"))


def _files(kind: Kind) -> Iterator[tuple[str, str]]:
    for name in shipped_names(kind):
        also = [alias for alias, meant in ALIASES.items() if kind == "method" and meant == name]
        called = f" (also: {', '.join(also)})" if also else ""
        yield f"{name}{called}", say_first_words(shipped_folder() / FOLDERS[kind] / f"{name}.yaml")


def _harness_tasks(word: str) -> list[tuple[str, str]]:
    try:
        index = task_index()
    except ImportError:
        raise UserError(f"list tasks {word}: lm-evaluation-harness is not installed; {install('eval')}") from None
    names = sorted(
        (name for name in index if word.lower() in name.lower()),
        key=lambda name: (name.lower() != word.lower(), not name.lower().startswith(word.lower()), name),
    )
    if not names:
        near = did_you_mean(word, list(index))
        raise UserError(f"list tasks {word}: lm-evaluation-harness has no task with this in its name{near}")
    return [(name, "group" if index[name].kind.name == "GROUP" else "task") for name in names]
