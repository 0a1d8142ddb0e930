"""The items that a model lost and gained, as a page shows them: short in one line, whole below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cofitune.reports.shape import Entry

ITEMS_A_TASK = 10  # shown of each task; all of them are in eval/changed
LONGEST, SHORTEST = 6000, 90  # characters of a text, and of one in a line


@dataclass(frozen=True)
class Answer:
    """What one model said: the text (of a choice, the choice's) and the item's score."""

    text: str
    score: str

    @property
    def short(self) -> str:
        """In one line."""
        return one_line(self.text)


@dataclass(frozen=True)
class ItemText:
    """One item; `choices` are there where it has some, each with what is said of it (right, before, now)."""

    line: int
    prompt: str
    reference: str
    before: Answer
    after: Answer
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def short(self) -> str:
        """What is right, in one line."""
        return one_line(self.reference)


@dataclass(frozen=True)
class ItemGroup:
    """Items of one task: how many there are, and the first of them."""

    task: str
    count: int
    items: tuple[ItemText, ...]


def item_groups(entries: Iterable[Entry]) -> list[ItemGroup]:
    """Sort the lines of lost.jsonl or gained.jsonl by task, in the order of their first."""
    by_task: dict[str, list[Entry]] = {}
    for entry in entries:
        by_task.setdefault(entry["task"], []).append(entry)
    return [
        ItemGroup(task, len(own), tuple(_item(e) for e in own[:ITEMS_A_TASK])) for task, own in by_task.items()
    ]  # fmt: skip


def one_line(text: str) -> str:
    """The beginning of a text, without line breaks."""
    plain = " ".join(text.split())
    return plain if len(plain) <= SHORTEST else plain[: SHORTEST - 1] + "…"


def _item(entry: Entry) -> ItemText:
    choices: Sequence[str] = entry.get("choices") or ()
    before, after = entry["before"], entry["after"]
    marks = [
        ", ".join(
            word
            for word, which in (
                ("right", entry["reference"]),
                ("before", before.get("pick")),
                ("now", after.get("pick")),
            )
            if which == index
        )
        for index in range(len(choices))
    ]
    return ItemText(
        line=entry["line"],
        prompt=_text(entry["prompt"]),
        reference=_text(_chosen(entry["reference"], choices)),
        before=_answer(before, choices),
        after=_answer(after, choices),
        choices=tuple(zip((_text(c) for c in choices), marks, strict=True)),
    )


def _answer(answer: Entry, choices: Sequence[str]) -> Answer:
    output = answer.get("answer")
    if output is None:
        output = _chosen(answer.get("pick"), choices)
    return Answer(_text(output), f"{answer['score']:.3g}")


def _chosen(value: object, choices: Sequence[str]) -> object:
    """A choice by its index."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return choices[value]
    return value


def _text(value: object) -> str:
    if value is None:  # an instruction to follow has no one right answer
        return ""
    if isinstance(value, list | tuple):
        value = " | ".join(map(str, value))
    text = str(value)
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]}… ({rest:,} more characters)"
