"""Read training items from JSONL: `{"instruction", "input", "output"}` or `{"messages": […]}`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofitune.errors import DataError

ROLES = ("system", "user", "assistant")
FIRST_SHOWN = 5


@dataclass(frozen=True)
class Item:
    """One conversation: turns of (role, content), ending with an assistant's, and where it stands (`file:line`)."""

    turns: tuple[tuple[str, str], ...]
    where: str

    def messages(self) -> list[dict[str, str]]:
        """The turns as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.turns]


@dataclass
class Account:
    """What became of the items: read, dropped (with reasons) and truncated."""

    read: int = 0
    dropped: list[str] = field(default_factory=list)
    truncated: int = 0


class _BadItemError(Exception):
    """Why one item cannot be used; becomes a DataError or a line in the account."""


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of each non-empty line.

    Raises:
        DataError: the file is missing, or a line is no JSON object (file:line).
    """
    for number, line in _lines(Path(path)):
        try:
            yield number, _parse(line)
        except _BadItemError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def read_items(sources: Sequence[tuple[str, str]], on_bad_item: str = "error") -> tuple[list[Item], Account]:
    """Read every item of the sources, in order.

    Args:
        sources: (path, format) pairs; format is auto, alpaca or messages.
        on_bad_item: error stops at the first unusable item; drop counts it in the account.

    Raises:
        DataError: a file is missing or empty, or an item is unusable: it does not parse, lacks a key, or has an empty
            response (file:line).
    """
    items: list[Item] = []
    account = Account()
    for path, form in sources:
        before = account.read
        for number, line in _lines(Path(path)):
            account.read += 1
            where = f"{path}:{number}"
            try:
                items.append(Item(_turns(_parse(line), form), where))
            except _BadItemError as error:
                bad_item(f"{where}: {error}", on_bad_item, account)
        if account.read == before:
            raise DataError(f"{path}: holds no items")
    return items, account


def bad_item(message: str, on_bad_item: str, account: Account) -> None:
    """Drop an unusable item and count it, or stop.

    Raises:
        DataError: where the config says `on_bad_item: error`.
    """
    if on_bad_item == "error":
        raise DataError(f"{message} (data.on_bad_item: drop would leave such items out and count them)")
    account.dropped.append(message)


def user_text(instruction: str, given: str = "") -> str:
    """The user's turn of an instruction item: the instruction, and below it the input where there is one.

    Training and evaluation both go through here, so that a model is asked as it was taught.
    """
    return "\n".join(part for part in (instruction.strip(), given.strip()) if part)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file (paths are relative to {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _parse(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadItemError(f"this line is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise _BadItemError(f"an item is a JSON object, not {type(value).__name__}")
    return value


def _turns(item: dict[str, Any], form: str) -> tuple[tuple[str, str], ...]:
    if form == "messages" or (form == "auto" and "messages" in item):
        return _chat_turns(item)
    if form == "alpaca" or "instruction" in item:
        return _alpaca_turns(item)
    raise _BadItemError(f"an item has 'messages', or 'instruction' and 'output'; this one has {sorted(item)}")


def _alpaca_turns(item: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    for key in ("instruction", "output"):
        if key not in item:
            raise _BadItemError(f"the item has no '{key}' (its keys: {', '.join(sorted(item))})")
    values = [item.get(key) or "" for key in ("instruction", "input", "output")]
    if not all(isinstance(v, str) for v in values):
        raise _BadItemError("instruction, input and output must be strings")
    prompt, output = user_text(values[0], values[1]), values[2]
    if not prompt:
        raise _BadItemError("instruction and input are both empty")
    if not output.strip():
        raise _BadItemError("the response ('output') is empty")
    return ("user", prompt), ("assistant", output)


def _chat_turns(item: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    messages = item.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadItemError("'messages' must be a list of turns with a role and a content")
    turns: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise _BadItemError(f"turn {index} needs a role ({', '.join(ROLES)}) and a content that is a string")
        if role == "assistant" and not content.strip():
            raise _BadItemError(f"the response in turn {index} is empty")
        turns.append((role, content))
    if turns[-1][0] != "assistant":
        raise _BadItemError(f"the last turn is the {turns[-1][0]}'s; it must be the assistant's, the response to learn")
    first = next(role for role, _ in turns if role != "system")
    if first != "user":
        raise _BadItemError(f"the first turn (after a system turn) is the {first}'s; it must be the user's")
    return tuple(turns)
