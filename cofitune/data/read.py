"""Items of training data: one conversation each, where it stands, and the account of what became of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofitune.data.formats import BadItemError, prompt_turns_of, turns_of
from cofitune.errors import DataError

FIRST_SHOWN = 5
Row = Any  # a line of JSON as text, or an element of an array or a row of a table


@dataclass(frozen=True)
class Item:
    """One conversation.

    Attributes:
        turns: (role, content) pairs, ending with an assistant's; of a prompt, with a user's.
        where: `file:line`, or `file: row n`.
        context: turns at the beginning that are given only: an assistant's turn among them is not learned.
    """

    turns: tuple[tuple[str, str], ...]
    where: str
    context: int = 0

    def messages(self) -> list[dict[str, str]]:
        """The turns as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.turns]


@dataclass
class ItemCounts:
    """What became of the items.

    Attributes:
        read: items in the files.
        kept: items that became examples.
        truncated: kept items that lost the end of their response to the length limit.
        tokens: tokens of the kept items.
        supervised: those of them that carry the loss.
        reasons: why items were dropped → how many.
        first_dropped: the first few of them, each with its place.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    supervised: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_dropped: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """Items that were left out."""
        return sum(self.reasons.values())

    def drop(self, reason: str, message: str) -> None:
        """Count one item that is left out."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first_dropped = [*self.first_dropped, message][:FIRST_SHOWN]

    @classmethod
    def total(cls, accounts: Iterable[ItemCounts]) -> ItemCounts:
        """Several as one, in order."""
        total = cls()
        for account in accounts:
            total.add(account)
        return total

    def add(self, other: ItemCounts) -> None:
        """Count another account's items, which come after one's own."""
        for name in ("read", "kept", "truncated", "tokens", "supervised"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.first_dropped = [*self.first_dropped, *other.first_dropped][:FIRST_SHOWN]


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of each non-empty line.

    Raises:
        DataError: the file is missing, or a line is no JSON object (file:line).
    """
    for number, line in lines(Path(path)):
        try:
            yield number, _object(_parse(line))
        except BadItemError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of each non-empty line of a text file, reading as it goes.

    Raises:
        DataError: the file is missing or no UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file (paths are relative to {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def make_item(where: str, row: Row, form: str) -> Item:
    """Make a row of a data file an item.

    Args:
        form: auto, alpaca, messages, sharegpt or prompt_completion.

    Raises:
        BadItemError: it does not parse, lacks a key, or has an empty response; the message begins with `where`.
    """
    try:
        turns, context = turns_of(_object(_parse(row) if isinstance(row, str) else row), form)
    except BadItemError as error:
        raise BadItemError(error.reason, f"{where}: {error}") from None
    return Item(turns, where, context)


def make_prompt(where: str, row: Row, form: str) -> Item:
    """Make a row of a data file a prompt: an item whose last turn is the user's.

    Raises:
        BadItemError: as `make_item`, but that no response is asked for.
    """
    try:
        return Item(prompt_turns_of(_object(_parse(row) if isinstance(row, str) else row), form), where)
    except BadItemError as error:
        raise BadItemError(error.reason, f"{where}: {error}") from None


def bad_item(error: BadItemError, on_bad_item: str, account: ItemCounts) -> None:
    """Drop an unusable item and count it, or stop.

    Raises:
        DataError: where the config says `on_bad_item: error`.
    """
    if on_bad_item == "error":
        raise DataError(f"{error} (data.on_bad_item: drop would leave such items out and count them)")
    account.drop(error.reason, str(error))


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise BadItemError(
            "not valid JSON", f"this line is not valid JSON: {error.msg} at column {error.colno}"
        ) from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadItemError("not a JSON object", f"an item is a JSON object, not {type(value).__name__}")
    return value
