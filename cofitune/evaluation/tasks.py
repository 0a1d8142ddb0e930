"""Tasks of an evaluation: what is asked, from which file, how it is scored. Read and checked before weights load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cofitune.data.read import read_jsonl, user_text
from cofitune.errors import DataError, UserError
from cofitune.evaluation.grade import ifeval_problem, needs_punkt, punkt_is_there
from cofitune.evaluation.metrics import METRICS, Metric
from cofitune.files import sha256_file

CATEGORIES = ("speciality", "gen_kn", "gen_rs", "instruct")
_TITLE = re.compile(r"^\w[\w .+-]*$")  # it also names a file


@dataclass(frozen=True)
class EvalTask:
    """One task, as plain values.

    Attributes:
        title: its name in tables and files.
        category: speciality, gen_kn, gen_rs or instruct.
        path: a JSONL file.
        kind: multiple_choice | generate | ifeval.
        metric: acc | acc_norm (log-likelihood per byte) | exact_match | regex | prompt_strict.
        pattern: for regex; its first group is compared with the reference.
        max_new_tokens: length limit of an answer, in tokens.
        stop: strings that end an answer, besides the end-of-turn token.
        limit: items to use, from the top; None: all.
    """

    title: str
    category: str
    path: str
    kind: str
    metric: str
    pattern: str | None = None
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class EvalItem:
    """One question, ready to be asked.

    Attributes:
        line: its line in the file, from 1.
        prompt: the text of the user's turn.
        choices: of a multiple-choice item, else empty.
        answer: index of the right choice, from 0.
        references: accepted answers of a generate item, else empty.
        checks: key, prompt, instruction_id_list and kwargs of an IFEval item, else None.
    """

    line: int
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = 0
    references: tuple[str, ...] = ()
    checks: dict[str, Any] | None = None

    @property
    def reference(self) -> str | int | list[str] | None:
        """What is right: the choice's index, the accepted answers, or the instructions to follow."""
        if self.choices:
            return self.answer
        if self.checks is not None:
            return list(self.checks["instruction_id_list"])
        return self.references[0] if len(self.references) == 1 else list(self.references)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its items and the sha256 of its file."""

    task: EvalTask
    items: tuple[EvalItem, ...]
    sha256: str

    @property
    def metric(self) -> Metric:
        """What the task's figure means."""
        return METRICS[self.task.metric]

    @property
    def chance(self) -> float:
        """The share of right answers that guessing gives: the mean of 1/choices, 0 where there is nothing to pick."""
        if self.task.kind != "multiple_choice":
            return 0.0
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)


class _BadItemError(Exception):
    """Why an item cannot be asked."""


def load_tasks(tasks: Iterable[EvalTask]) -> tuple[LoadedTask, ...]:
    """Read every task's items.

    Raises:
        UserError: two tasks have one title, a title that cannot name a file, or a pattern that cannot be used; IFEval's
            packages or NLTK's table are missing.
        DataError: a file is missing or empty, or an item cannot be used (file:line).
    """
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


def _check_task(task: EvalTask) -> None:
    where = f"eval.{task.category}: task '{task.title}'"
    if not _TITLE.match(task.title):
        raise UserError(f"{where}: a name is made of letters, digits, spaces and . _ + - (it also names a file)")
    if task.metric != "regex":
        return
    try:
        groups = re.compile(task.pattern or "").groups
    except re.error as error:
        raise UserError(f"{where}: pattern {task.pattern!r} is no regular expression: {error}") from None
    if groups == 0:
        raise UserError(f"{where}: pattern {task.pattern!r} has no group; put what is compared in parentheses")


def _load(task: EvalTask) -> LoadedTask:
    read = _READERS[task.kind]
    items: list[EvalItem] = []
    for line, fields in islice(read_jsonl(task.path), task.limit):
        try:
            items.append(read(line, fields))
        except _BadItemError as error:
            raise DataError(f"{task.path}:{line}: {error} (task '{task.title}', kind {task.kind})") from None
    if not items:
        raise DataError(f"{task.path}: holds no items (task '{task.title}')")
    if task.kind == "ifeval":
        _check_punkt(task, items)
    return LoadedTask(task, tuple(items), sha256_file(Path(task.path)))


def _multiple_choice(line: int, fields: dict[str, Any]) -> EvalItem:
    choices = fields.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(c) for c in choices):
        raise _BadItemError("'choices' must be a list of two or more strings that are not empty")
    answer = fields.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise _BadItemError(f"'answer' must be the right choice's index, 0 to {len(choices) - 1} (given: {answer!r})")
    return EvalItem(line, _question(fields), tuple(choices), answer)


def _generate(line: int, fields: dict[str, Any]) -> EvalItem:
    if "instruction" in fields:
        instruction, given = fields["instruction"], fields.get("input") or ""
        if not isinstance(instruction, str) or not isinstance(given, str):
            raise _BadItemError("'instruction' and 'input' must be strings")
        prompt = user_text(instruction, given)
        if not prompt:
            raise _BadItemError("'instruction' and 'input' are both empty")
    else:
        prompt = _question(fields)
    key = next((k for k in ("answers", "answer", "output") if fields.get(k) is not None), None)
    if key is None:
        raise _BadItemError(f"there is no 'answers', 'answer' or 'output' to compare with (keys: {_keys(fields)})")
    references = fields[key] if isinstance(fields[key], list) else [fields[key]]
    if not references or not all(_is_text(r) for r in references):
        raise _BadItemError(
            f"'{key}' must be a string, or a list of strings, that is not empty (given: {fields[key]!r})"
        )
    return EvalItem(line, prompt, references=tuple(references))


def _ifeval(line: int, fields: dict[str, Any]) -> EvalItem:
    missing = [k for k in ("key", "prompt", "instruction_id_list", "kwargs") if k not in fields]
    if missing:
        raise _BadItemError(f"there is no {', '.join(map(repr, missing))} (keys: {_keys(fields)})")
    if not _is_text(fields["prompt"]):
        raise _BadItemError("'prompt' must be a string that is not empty")
    names, arguments = fields["instruction_id_list"], fields["kwargs"]
    if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(names) != len(arguments):
        raise _BadItemError("'instruction_id_list' and 'kwargs' must be lists of one length, one entry an instruction")
    if not all(isinstance(a, dict) for a in arguments):
        raise _BadItemError("each entry of 'kwargs' must be an object")
    checks = {k: fields[k] for k in ("key", "prompt", "instruction_id_list", "kwargs")}
    if problem := ifeval_problem(checks):
        raise _BadItemError(problem)
    return EvalItem(line, fields["prompt"], checks=checks)


_READERS: dict[str, Callable[[int, dict[str, Any]], EvalItem]] = {
    "multiple_choice": _multiple_choice,
    "generate": _generate,
    "ifeval": _ifeval,
}


def _check_punkt(task: EvalTask, items: list[EvalItem]) -> None:
    lines = [item.line for item in items if needs_punkt(item.checks or {})]
    if lines and not punkt_is_there():
        shown = ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
        raise UserError(
            f"{task.path}: {len(lines)} of {len(items)} items (lines {shown}) count sentences or capital words, for "
            "which NLTK needs its table punkt_tab: python -m nltk.downloader punkt_tab (or leave these items out)"
        )


def _question(fields: dict[str, Any]) -> str:
    """The question, below its context where it has one."""
    question, context = fields.get("question"), fields.get("context") or ""
    if not _is_text(question) or not isinstance(context, str):
        raise _BadItemError(
            f"'question' must be a string that is not empty, and 'context' a string (keys: {_keys(fields)})"
        )
    return user_text(context, str(question))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _keys(fields: dict[str, Any]) -> str:
    return ", ".join(sorted(fields))
