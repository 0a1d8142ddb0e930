"""One turn of a conversation: its role, its text, and what templates read beside these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cofitune.errors import DataError

ROLES = {  # a role as data write it → as transformers' templates name it
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
LEARN_KEYS = ("weight", "train", "loss")  # of a response: 0 or false keeps it from being learned
REASONING = ("reasoning_content", "thinking")
OF_TOOLS = ("tool_call_id", "name")


class BadItemError(DataError):
    """One item that cannot be used. `reason` names its kind, in words that many items share."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text.
        extra: tool_calls, reasoning_content, thinking, name and tool_call_id, as transformers' templates take them.
        learn: of a response: whether it is learned, or only given.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    learn: bool = True


def read_turn(
    index: int, given: object, role_key: str, content_key: str, roles: Mapping[str, str]
) -> tuple[Turn, list[str]]:
    """Read one turn.

    Args:
        index: its place, for messages.
        role_key, content_key: role and content, or from and value.

    Returns:
        The turn, and the keys of it that are not read.

    Raises:
        BadItemError: its role is unknown, its content is no text, or a key has a value that nothing can be made of.
    """
    turn = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
    role = turn.pop(role_key, None)
    if not isinstance(role, str) or role not in roles:
        small = isinstance(role, str) and role.lower() in roles
        hint = f"; write it '{str(role).lower()}'" if small else ""
        raise _bad_turn(index, role_key, content_key, roles, f"{role_key} is {role!r:.60}{hint}")
    extra = _calls(index, turn) if roles[role] == "assistant" else {}
    content = turn.pop(content_key, "" if extra else None)
    if role == "function_call":
        content, extra = "", {"tool_calls": _tool_calls(index, [content])}
    text = _text(index, content, content_key)
    if text is None:
        raise _bad_turn(index, role_key, content_key, roles, f"{content_key} is {content!r:.60}")
    learn = True
    if roles[role] == "assistant":
        learn = _learns(index, turn)
        extra |= {key: _reasoning(index, key, turn.pop(key)) for key in REASONING if turn.get(key)}
    elif roles[role] == "tool":
        extra = {key: turn.pop(key) for key in OF_TOOLS if isinstance(turn.get(key), str)}
    else:  # a prompt is never learned: 0 says what is so anyway, 1 is told as a key that is not read
        for key in LEARN_KEYS:
            if _switch(turn.get(key)) is False:
                turn.pop(key)
    unread = [key for key in turn if turn[key] not in ("", [], {})]
    return Turn(roles[role], text, extra, learn), unread + _unread_of_parts(content, content_key)


def read_tools(given: object) -> tuple[dict[str, object], ...]:
    """Read the tools that a conversation may call: a list of JSON schemas, or the same as a text of JSON.

    Raises:
        BadItemError: it is neither.
    """
    tools = json_of(given) if isinstance(given, str) and given.strip() else given or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadItemError("bad tools", "'tools' must be a list of tool descriptions (objects of JSON)")
    return tuple(tools)


def check_text(value: object, what: str) -> None:
    """Refuse half of a character that UTF-16 writes as two (a lone surrogate): no tokenizer takes it.

    Args:
        value: a text, or any value of JSON.
        what: names it in the message.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BadItemError(
            "broken character",
            f"{what} holds half a character (\\u{code:04x} at character {error.start + 1}), as when an emoji was cut "
            "in two",
        ) from None


def shown(name: str) -> str:
    """A key's name as it can be written: half a character in it as its escape."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def json_of(text: str) -> object:
    """A value that stands in a text; None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _bad_turn(index: int, role_key: str, content_key: str, roles: Mapping[str, str], given: str) -> BadItemError:
    return BadItemError(
        "bad turn",
        f"turn {index} needs a {role_key} ({', '.join(roles)}) and a {content_key} that is a string; its {given}",
    )


def _unread_of_parts(content: object, content_key: str) -> list[str]:
    """Keys of text parts that nothing reads."""
    parts = content if isinstance(content, list) else []
    keys = (key for part in parts for key, value in part.items() if value is not None)
    return list(dict.fromkeys(f"{content_key}[].{key}" for key in keys if key not in ("type", "text")))


def _text(index: int, content: object, content_key: str) -> str | None:
    """The content as one text; None where it is neither a text nor a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise BadItemError(
                "not text",
                f"turn {index}: {content_key} has a part of type {part.get('type')!r}; only text can be learned",
            )
    return "".join(part["text"] for part in content)


def _learns(index: int, turn: dict[str, object]) -> bool:
    """Take `weight`, `train` and `loss` out of a response's keys."""
    said = {key: turn.pop(key) for key in LEARN_KEYS if key in turn}
    switches = {key: _switch(value) for key, value in said.items()}
    for key, switch in switches.items():
        if switch is None:
            raise BadItemError(
                "bad weight",
                f"turn {index}: {key} must be 1 or true (learned), or 0 or false (given, not learned), not "
                f"{said[key]!r}; how often an item counts is data.train.weight",
            )
    if len(set(switches.values())) > 1:
        raise BadItemError("bad weight", f"turn {index}: {' and '.join(said)} contradict each other")
    return all(switches.values())


def _switch(value: object) -> bool | None:
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _reasoning(index: int, key: str, value: object) -> str:
    text = _text(index, value, key)
    if text is None:
        raise BadItemError("bad turn", f"turn {index}: {key} must be a string")
    return text


def _calls(index: int, turn: dict[str, object]) -> dict[str, object]:
    calls, one = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if isinstance(calls, str) and calls.strip():
        calls = json_of(calls)
        if calls is None:
            raise BadItemError("bad tool call", f"turn {index}: tool_calls is a text that is no JSON")
    given = calls or ([one] if one else [])
    return {"tool_calls": _tool_calls(index, given)} if given else {}


def _tool_calls(index: int, calls: object) -> list[dict[str, object]]:
    """Calls as templates take them: the arguments as an object, which some data hold as a text of JSON."""
    results = []
    for given in calls if isinstance(calls, list) else [calls]:
        call = json_of(given) if isinstance(given, str) else given
        call = call if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadItemError("bad tool call", f"turn {index}: a tool call needs a function with a name and arguments")
        arguments = function.get("arguments", {})
        arguments = json_of(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
        if not isinstance(arguments, dict):
            raise BadItemError("bad tool call", f"turn {index}: the arguments of a tool call must be an object of JSON")
        about = {k: v for k, v in call.items() if k == "id" and v is not None}
        results.append({**about, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return results
