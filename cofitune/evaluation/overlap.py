"""Which texts are also asked in a test: rehearsal must not train on the items that it is judged by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cofitune.data.formats import user_text
from cofitune.data.read import read_jsonl
from cofitune.evaluation.items import EvalTask

NGRAM = 13  # words in a row that two texts share by accident hardly ever (GPT-3's rule, arXiv 2005.14165, appendix C)
Words = tuple[str, ...]
OWN_ITEMS = ("harness", "drift")  # kinds whose items lie in no file of questions


class TestItems:
    """The questions of all tasks, by their words; case, punctuation and white space aside."""

    __test__ = False  # no class of tests, whatever pytest makes of its name

    def __init__(self, tasks: Iterable[EvalTask]) -> None:
        """Read the files of all tasks, all items of each, whatever the tasks' limits.

        Raises:
            DataError: a file is missing, or a line is no JSON object.
        """
        self._grams: dict[Words, str] = {}
        self.unread: list[str] = []  # titles of tasks whose items are not in a file of ours
        for task in tasks:
            if task.kind in OWN_ITEMS:
                if task.kind == "harness":
                    self.unread.append(task.title)
                continue
            for _, fields in read_jsonl(Path(task.path), task.on_bad_item):
                for gram in _grams(_question(fields)):
                    self._grams.setdefault(gram, task.title)

    def task_of(self, text: str) -> str | None:
        """The task that asks this text, or shares 13 words in a row with it; None where none does."""
        return next((self._grams[gram] for gram in _grams(text) if gram in self._grams), None)


def _question(fields: Mapping[str, object]) -> str:
    """The text of an item that a model is asked, in whichever kind of task."""
    instruction = fields.get("instruction")
    if isinstance(instruction, str):
        return user_text(instruction, str(fields.get("input") or ""))
    return next((text for key in ("prompt", "question") if isinstance(text := fields.get(key), str)), "")


def _grams(text: str) -> Iterator[Words]:
    """All runs of 13 words of a text; of a shorter one, all of it."""
    words = tuple(re.findall(r"\w+", text.casefold()))
    if words:
        for start in range(max(1, len(words) - NGRAM + 1)):
            yield words[start : start + NGRAM]
