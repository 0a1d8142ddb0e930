"""Items of training data: one conversation each, where it stands, and the account of what became of all of them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cofitune.data.formats import BadItemError, Conversation, prompt_turns_of, turns_of
from cofitune.data.turns import check_text
from cofitune.errors import DataError

FIRST_SHOWN = 5
COUNTED = ("read", "kept", "truncated", "tokens", "supervised", "further_examples", "without_end", "reasoning")
Row = object  # an item of JSON as text, a row of a table, or a BadRow
READ_ERRORS = (OSError, EOFError, zlib.error)  # the last two: a .gz file that was cut or damaged


@dataclass(frozen=True)
class BadRow:
    """A row of a table that is no item, with the words of `BadItemError`."""

    reason: str
    message: str


@dataclass(frozen=True)
class Item:
    """One conversation.

    Attributes:
        turns: (role, content) pairs, ending with an assistant's; of a prompt, with a user's.
        where: `file:line`, or `file: row n`.
        context: turns at the beginning that are given only: an assistant's turn among them is not learned.
        given: places of further responses that are given only.
        extras: what each turn holds beside role and content (tool_calls, reasoning_content, …), or none at all.
        tools: JSON schemas of the tools that may be called.
        unread: names of the item's keys that nothing reads.
    """

    turns: tuple[tuple[str, str], ...]
    where: str
    context: int = 0
    given: frozenset[int] = frozenset()
    extras: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[dict[str, object], ...] = ()
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, read: Conversation, where: str) -> Item:
        """What was read of one row."""
        return cls(
            tuple((turn.role, turn.content) for turn in read.turns),
            where,
            read.context,
            frozenset(index for index, turn in enumerate(read.turns) if not turn.learn),
            tuple(turn.extra for turn in read.turns) if any(turn.extra for turn in read.turns) else (),
            read.tools,
            read.unread,
        )

    def learns(self, index: int) -> bool:
        """Whether a turn is a response that is learned."""
        return self.turns[index][0] == "assistant" and index >= self.context and index not in self.given

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates take them."""
        extras = self.extras or ({},) * len(self.turns)
        return [
            {"role": role, "content": content, **extra}
            for (role, content), extra in zip(self.turns, extras, strict=True)
        ]


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
        unread: keys of kept items that nothing reads → in how many items.
        further_examples: examples beyond one an item, where the template rewrites earlier turns.
        without_end: kept items of which a response ends without a control token.
        reasoning: kept items whose learned responses hold reasoning.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    supervised: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_dropped: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    further_examples: int = 0
    without_end: int = 0
    reasoning: int = 0

    @property
    def dropped(self) -> int:
        """Items that were left out."""
        return sum(self.reasons.values())

    def drop(self, reason: str, message: str) -> None:
        """Count one item that is left out."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first_dropped = [*self.first_dropped, message][:FIRST_SHOWN]

    def note_unread(self, keys: Iterable[str]) -> None:
        """Count the keys of one item that nothing reads."""
        for key in keys:
            self.unread[key] = self.unread.get(key, 0) + 1

    @classmethod
    def total(cls, accounts: Iterable[ItemCounts]) -> ItemCounts:
        """Several as one, in order."""
        total = cls()
        for account in accounts:
            total.add(account)
        return total

    def add(self, other: ItemCounts) -> None:
        """Count another account's items, which come after one's own."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for key, count in other.unread.items():
            self.unread[key] = self.unread.get(key, 0) + count
        self.first_dropped = [*self.first_dropped, *other.first_dropped][:FIRST_SHOWN]


def read_jsonl(path: str | Path, on_bad_item: str = "error") -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number from 1, object) of each non-empty line.

    Args:
        on_bad_item: error, or drop: leave out a line that is no JSON object.

    Raises:
        DataError: the file is missing, or a line is no JSON object (file:line).
    """
    for number, line in lines(Path(path)):
        try:
            yield number, read_object(line)
        except BadItemError as error:
            if on_bad_item == "error":
                raise DataError(f"{path}:{number}: {error}") from None


def read_object(line: str) -> dict[str, object]:
    """The JSON object that a line holds, with texts that can be encoded.

    Raises:
        BadItemError: it is no JSON object, a key stands there twice, or a text holds half a character.
    """
    value = _object(parse(line))
    if "\\u" in line:
        check_text(value, "this line")
    return value


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of each non-empty line of a text file, or of one in gzip, reading as it goes.

    Raises:
        DataError: the file is missing or no UTF-8 text.
    """
    number = 0
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path}: is neither a file nor a folder; data are read more than once")
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file (paths are relative to {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read: {error}, after line {number}; save it as UTF-8") from None
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """Open UTF-8 text, through gzip where the file's name ends in .gz."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def make_item(where: str, row: Row, form: str) -> Item:
    """Make a row of a data file an item.

    Args:
        form: auto, alpaca, messages, sharegpt or prompt_completion.

    Raises:
        BadItemError: it does not parse, lacks a key, or has an empty response; the message begins with `where`.
    """
    try:
        return Item.of(turns_of(_fields(row), form), where)
    except BadItemError as error:
        raise BadItemError(error.reason, f"{where}: {error}") from None


def make_prompt(where: str, row: Row, form: str) -> Item:
    """Make a row of a data file a prompt: an item whose last turn is the user's.

    Raises:
        BadItemError: as `make_item`, but that no response is asked for.
    """
    try:
        return Item.of(prompt_turns_of(_fields(row), form), where)
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


def parse(line: str) -> object:
    """The value of one line of JSON.

    Raises:
        BadItemError: it is no JSON (with the column), is nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(line.rstrip("\r\n"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        where = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise BadItemError("not valid JSON", f"this line is not valid JSON: {where}{_advice(line, error)}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets within brackets
        deep = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadItemError("not valid JSON", f"this line is not valid JSON: {deep}") from None


def _advice(line: str, error: json.JSONDecodeError) -> str:
    if line.strip() == "{":
        return "; a line holds a whole object (objects over several lines: put them into a list, in a file named .json)"
    return "; a comma stands behind the object" if line[error.pos :].strip() == "," else ""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON; Python's reader would keep the last of two equal keys without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadItemError("key twice", f"the key '{twice}' stands there twice")
    return value


def _fields(row: Row) -> dict[str, object]:
    if isinstance(row, BadRow):
        raise BadItemError(row.reason, row.message)
    return _object(parse(row) if isinstance(row, str) else row)


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadItemError("not a JSON object", f"an item is a JSON object, not {type(value).__name__}")
    return value
