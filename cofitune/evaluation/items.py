"""One task of an evaluation, and the items of its JSONL file: read and checked before weights load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cofitune.data.formats import BadItemError, user_text
from cofitune.data.read import lines, read_object
from cofitune.data.turns import shown
from cofitune.errors import DataError, UserError
from cofitune.evaluation.ifeval import NO_PUNKT, Checks, ifeval_problem, needs_punkt, punkt_is_there
from cofitune.evaluation.metrics import Metric, unreachable
from cofitune.rehearsal.items import Rehearsal

if TYPE_CHECKING:
    from lm_eval.api.task import Task

IFEVAL_KEYS = ("key", "prompt", "instruction_id_list", "kwargs")
ANSWERS, LOSS_ANSWERS = ("answers", "answer", "output"), ("output", "answer", "answers")  # the first one counts


@dataclass(frozen=True)
class EvalTask:
    """One task, as plain values.

    Attributes:
        title: its name in tables and files.
        category: speciality, gen_kn, gen_rs or instruct.
        path: a JSONL file; of a harness task the folder of its data, or empty for the hub's.
        kind: multiple_choice | generate | loss | ifeval | harness.
        metric: by its name in `cofitune.evaluation.metrics`; of a harness task by the harness's, empty for its first.
        pattern: its first group in the answer is what is compared with the reference; None: all of the answer.
        max_new_tokens: length limit of an answer, in tokens.
        stop: strings that end an answer, besides the end-of-turn token.
        limit: items to use, from the top; None: all.
        prompt: chat: the item is a user's turn; continuation: the answer continues in the item's own text.
        answer_field: the key that holds the right answer(s); None: the kind's own.
        tokenize: words of squad_match, f1, rouge_l and bleu: default | zh.
        on_bad_item: error, or drop: leave out what cannot be asked or judged.
        harness: name of a task or group of lm-evaluation-harness, whose data `path` may hold; None: a file's task.
        num_fewshot: harness: examples in the prompt; None: the task's own number.
        apply_chat_template: harness: its prompts inside the chat template.
        think_end_token: what ends the reasoning of a model that thinks first; None: it is asked to answer at once.
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
    prompt: str = "chat"
    answer_field: str | None = None
    tokenize: str = "default"
    on_bad_item: str = "error"
    harness: str | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    think_end_token: str | None = None


@dataclass(frozen=True)
class EvalItem:
    """One question, ready to be asked.

    Attributes:
        line: its line in the file, from 1.
        prompt: the text of the user's turn, or the text to continue in.
        choices: of a multiple-choice item, else empty.
        answer: index of the right choice, from 0.
        references: accepted answers of a generate item, the one text of a loss item, else empty.
        checks: key, prompt, instruction_id_list and kwargs of an IFEval item, else None.
    """

    line: int
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = 0
    references: tuple[str, ...] = ()
    checks: Checks | None = None

    @property
    def reference(self) -> str | int | list[str] | None:
        """What is right: the choice's index, the accepted answers, or the instructions to follow."""
        if self.choices:
            return self.answer
        if self.checks is not None:
            return list(self.checks["instruction_id_list"])
        return self.references[0] if len(self.references) == 1 else list(self.references)


class _BadItemError(Exception):
    """Why an item cannot be asked."""


class ReadItems(NamedTuple):
    """What a task's file holds.

    Attributes:
        unusable: the lines that `on_bad_item: drop` leaves out.
        unread: keys of the items that nothing reads, each with the number of items, in the order of the file.
    """

    items: tuple[EvalItem, ...]
    unusable: tuple[int, ...]
    unread: tuple[tuple[str, int], ...]


def read_items(task: EvalTask) -> ReadItems:
    """Read a task's file.

    Raises:
        UserError: NLTK's table is missing.
        DataError: the file is missing or holds no usable item, or an item cannot be used (file:line).
    """
    read = _READERS[task.kind]
    items: list[EvalItem] = []
    unusable: list[int] = []
    unread: Counter[str] = Counter()
    for line, text in islice(lines(Path(task.path)), task.limit):
        try:
            fields = read_object(text)
            items.append(read(line, fields, task))
            unread.update(unread_keys(fields, task))
        except (_BadItemError, BadItemError) as error:
            if task.on_bad_item == "drop":
                unusable.append(line)
                continue
            raise DataError(f"{task.path}:{line}: {error} (task '{task.title}', kind {task.kind})") from None
    needing = [item.line for item in items if needs_punkt(item.checks or {})]
    if needing and not punkt_is_there():
        if task.on_bad_item == "error":
            of = f"{task.path}: {len(needing)} of {len(items)} items (lines {_some(needing)})"
            raise UserError(f"{of} {NO_PUNKT} (or leave them out: on_bad_item: drop)")
        unusable += needing
        items = [item for item in items if item.line not in needing]
    if not items:
        usable = f"usable items ({len(unusable)} cannot be asked or judged)" if unusable else "items"
        raise DataError(f"{task.path}: holds no {usable} (task '{task.title}')")
    return ReadItems(tuple(items), tuple(sorted(unusable)), tuple(unread.items()))


def unread_keys(fields: dict[str, object], task: EvalTask) -> list[str]:
    """Keys of an item that its task does not read; one whose value is null counts as absent."""
    read: tuple[str, ...]
    if task.kind == "ifeval":
        read = IFEVAL_KEYS
    elif task.kind == "multiple_choice" or (task.kind == "loss" and _is_choice(fields, task)):
        read = ("question", "context", "choices", "answer")
    else:
        known = LOSS_ANSWERS if task.kind == "loss" else ANSWERS
        asked = ("instruction", "input") if "instruction" in fields else ("question", "context")
        read = (*asked, *(key for key in [_answer_key(fields, task.answer_field, known)] if key))
    return [shown(key) for key, value in fields.items() if value is not None and key not in read]


def _multiple_choice(line: int, fields: dict[str, object], task: EvalTask) -> EvalItem:
    choices = fields.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(c) for c in choices):
        raise _BadItemError("'choices' must be a list of two or more strings that are not empty")
    answer = fields.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise _BadItemError(f"'answer' must be the right choice's index, 0 to {len(choices) - 1} (given: {answer!r})")
    return EvalItem(line, _question(fields), tuple(choices), answer)


def _generate(line: int, fields: dict[str, object], task: EvalTask) -> EvalItem:
    references = _answers(fields, task.answer_field, ANSWERS)
    if why := unreachable(task.metric, references, task.tokenize):
        raise _BadItemError(f"{why}, so no answer could be right")
    return EvalItem(line, _asked(fields), references=references)


def _loss(line: int, fields: dict[str, object], task: EvalTask) -> EvalItem:
    if _is_choice(fields, task):
        item = _multiple_choice(line, fields, task)
        return EvalItem(line, item.prompt, references=(item.choices[item.answer],))
    return EvalItem(line, _asked(fields), references=_answers(fields, task.answer_field, LOSS_ANSWERS)[:1])


def _is_choice(fields: dict[str, object], task: EvalTask) -> bool:
    """Whether the one text of a loss item is the right one of its choices."""
    choices, answer = fields.get("choices"), fields.get("answer")
    return task.answer_field is None and isinstance(choices, list) and isinstance(answer, int)


def _asked(fields: dict[str, object]) -> str:
    """The user's turn: instruction and input as training joins them, or the question below its context."""
    if "instruction" not in fields:
        return _question(fields)
    instruction, given = fields["instruction"], _or_empty(fields, "input")
    if not isinstance(instruction, str) or not isinstance(given, str):
        raise _BadItemError("'instruction' and 'input' must be strings")
    if not (prompt := user_text(instruction, given)):
        raise _BadItemError("'instruction' and 'input' are both empty")
    return prompt


def _answers(fields: dict[str, object], requested: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """What is right: the string, or the list of strings, under `requested` or the first of the known keys."""
    key = _answer_key(fields, requested, known)
    if key is None:
        names = f"'{requested}'" if requested else ", ".join(map(repr, known[:-1])) + f" or '{known[-1]}'"
        raise _BadItemError(f"there is no {names} to compare with (keys: {_keys(fields)})")
    given = fields[key]
    answers = given if isinstance(given, list) else [given]
    texts = tuple(answer for answer in answers if isinstance(answer, str) and answer.strip())
    if not texts or len(texts) < len(answers):
        raise _BadItemError(f"'{key}' must be a string, or a list of strings, that is not empty (given: {given!r})")
    return texts


def _answer_key(fields: dict[str, object], requested: str | None, known: tuple[str, ...]) -> str | None:
    return next((k for k in ((requested,) if requested else known) if fields.get(k) is not None), None)


def _ifeval(line: int, fields: dict[str, object], task: EvalTask) -> EvalItem:
    missing = [k for k in IFEVAL_KEYS if k not in fields]
    if missing:
        raise _BadItemError(f"there is no {', '.join(map(repr, missing))} (keys: {_keys(fields)})")
    prompt = fields["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise _BadItemError("'prompt' must be a string that is not empty")
    names, arguments = fields["instruction_id_list"], fields["kwargs"]
    if not (isinstance(names, list) and names and all(_is_text(name) for name in names)) or not (
        isinstance(arguments, list) and len(names) == len(arguments)
    ):
        raise _BadItemError("'instruction_id_list' and 'kwargs' must be lists of one length, one entry an instruction")
    if not all(isinstance(a, dict) for a in arguments):
        raise _BadItemError("each entry of 'kwargs' must be an object")
    checks: Checks = {"key": fields["key"], "prompt": prompt, "instruction_id_list": names, "kwargs": arguments}
    if problem := ifeval_problem(checks):
        raise _BadItemError(problem)
    return EvalItem(line, prompt, checks=checks)


_READERS: dict[str, Callable[[int, dict[str, object], EvalTask], EvalItem]] = {
    "multiple_choice": _multiple_choice,
    "generate": _generate,
    "loss": _loss,
    "ifeval": _ifeval,
}


def _some(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")


def _question(fields: dict[str, object]) -> str:
    """The question, below its context where it has one."""
    question, context = fields.get("question"), _or_empty(fields, "context")
    if not _is_text(question) or not isinstance(context, str):
        raise _BadItemError(
            f"'question' must be a string that is not empty, and 'context' a string (keys: {_keys(fields)})"
        )
    return user_text(context, str(question))


def _or_empty(fields: dict[str, object], key: str) -> object:
    """A value that may be absent or null; 0 and false are values."""
    return "" if fields.get(key) is None else fields[key]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _keys(fields: dict[str, object]) -> str:
    return ", ".join(sorted(fields))


@dataclass(frozen=True)
class LoadedTask:
    """A task with its items.

    Attributes:
        sha256: hash of its file, or of a harness task's settings and items.
        metric: what its figure means.
        unusable: lines of the items that cannot be asked or judged, and were left out as `on_bad_item` says.
        unread: keys of the items that nothing reads, each with the number of items.
        left_out: lines of the items that do not fit into the model, as `fit_lengths` found.
        cut: lines of a harness task's items whose prompts the harness cuts from the left to make them fit, likewise.
        too_long: lines of the items whose right answer is longer than an answer may be, likewise; they stay in.
        longest: tokens of the longest prompt, likewise; 0 before.
        longest_whole: tokens of the longest prompt with its answer, likewise; 0 before.
        logits_at_once: of an item, the tokens whose logits are made at once at most, likewise; 0 before.
        asked_sha256: hash of all prompts and given answers as the model sees them, likewise; empty before.
        harness: the harness's own task objects, several for a group; none for a file's task.
        rehearsal: of kind drift, the rehearsal whose held-out items these are; else None.
    """

    task: EvalTask
    items: tuple[EvalItem, ...]
    sha256: str
    metric: Metric
    unusable: tuple[int, ...] = ()
    unread: tuple[tuple[str, int], ...] = ()
    left_out: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    longest: int = 0
    longest_whole: int = 0
    logits_at_once: int = 0
    asked_sha256: str = ""
    harness: tuple[Task, ...] = field(default=(), compare=False, repr=False)
    rehearsal: Rehearsal | None = field(default=None, compare=False, repr=False)

    @property
    def about_unread(self) -> str:
        """Says which keys of the items nothing reads."""
        keys = ", ".join(f"{key} ({count:,})" for key, count in self.unread)
        return f"{self.task.title}: keys that nothing reads, with the number of items: {keys}"

    @property
    def chance(self) -> float:
        """The share of right answers that guessing gives: the mean of 1/choices, 0 where there is nothing to pick."""
        return sum(1 / len(item.choices) for item in self.items if item.choices) / len(self.items)
