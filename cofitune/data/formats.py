"""The forms in which conversations come, each made into turns of (role, content)."""

from __future__ import annotations

from typing import Any

from cofitune.errors import DataError

Turns = tuple[tuple[str, str], ...]
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadItemError(DataError):
    """One item that cannot be used. `reason` names its kind, in words that many items share."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def turns_of(item: dict[str, Any], form: str) -> tuple[Turns, int]:
    """Read one item.

    Args:
        item: a JSON object or a table's row; a key whose value is null counts as absent, as tables fill gaps so.
        form: alpaca (instruction, input, output), messages (role, content), sharegpt (conversations of from, value),
            prompt_completion (strings, or lists of messages as TRL has them), or auto: by the item's keys.

    Returns:
        The turns, and how many of them at the beginning are given only, so that no response among them is learned.

    Raises:
        BadItemError: a key is missing, a value has the wrong type, a response is empty, or the turns are out of order.
    """
    item = {key: value for key, value in item.items() if value is not None}
    if form == "auto":
        form = _guess(item)
    if form == "alpaca":
        return _alpaca(item), 0
    if form == "prompt_completion":
        return _prompt_completion(item)
    if form == "sharegpt":
        return _conversation(_turns(item, "conversations", "from", "value", SHAREGPT_ROLES)), 0
    return _conversation(_turns(item, "messages", "role", "content", dict(zip(ROLES, ROLES, strict=True)))), 0


def prompt_turns_of(item: dict[str, Any], form: str) -> Turns:
    """Read one item as a prompt alone: its turns up to a user's, the last response left out where there is one.

    Args:
        item, form: as `turns_of` takes them; of alpaca the output may be missing, of prompt_completion the completion.

    Raises:
        BadItemError: a key is missing, a value has the wrong type, or there is no user's turn at the end.
    """
    item = {key: value for key, value in item.items() if value is not None}
    if form == "auto":
        form = _guess(item)
    if form == "alpaca":
        _require(item, "instruction")
        values = [item.get(key) or "" for key in ("instruction", "input")]
        if not all(isinstance(v, str) for v in values):
            raise BadItemError("wrong type", "instruction and input must be strings")
        turns: Turns = (("user", user_text(*values)),)
    elif form == "prompt_completion":
        _require(item, "prompt")
        given = item["prompt"]
        roles = dict(zip(ROLES, ROLES, strict=True))
        turns = (("user", given),) if isinstance(given, str) else _turns(item, "prompt", "role", "content", roles)
    elif form == "sharegpt":
        turns = _turns(item, "conversations", "from", "value", SHAREGPT_ROLES)
    else:
        turns = _turns(item, "messages", "role", "content", dict(zip(ROLES, ROLES, strict=True)))
    if turns[-1][0] == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1][0] != "user":
        raise BadItemError(
            "no prompt at the end",
            "a prompt ends with the user's turn (a last response is left out); "
            + (f"this one ends with the {turns[-1][0]}'s" if turns else "this one has no turn but a response"),
        )
    if not turns[-1][1].strip():
        raise BadItemError("empty prompt", "the prompt is empty")
    first = next(role for role, _ in turns if role != "system")
    if first != "user":
        raise BadItemError(
            "first turn not the user's", f"the first turn (after a system turn) is the {first}'s; it must be the user's"
        )
    return turns


def user_text(instruction: str, given: str = "") -> str:
    """The user's turn of an instruction item: the instruction, and below it the input where there is one.

    Training and evaluation both go through here, so that a model is asked as it was taught.
    """
    return "\n".join(part for part in (instruction.strip(), given.strip()) if part)


def _guess(item: dict[str, Any]) -> str:
    for key, form in (
        ("messages", "messages"),
        ("conversations", "sharegpt"),
        ("instruction", "alpaca"),
        ("prompt", "prompt_completion"),
    ):
        if key in item:
            return form
    raise BadItemError(
        "unknown keys",
        "an item has 'messages', 'conversations', 'instruction' and 'output', or 'prompt' and 'completion'; this one "
        f"has {sorted(item)}",
    )


def _alpaca(item: dict[str, Any]) -> Turns:
    _require(item, "instruction", "output")
    values = [item.get(key) or "" for key in ("instruction", "input", "output")]
    if not all(isinstance(v, str) for v in values):
        raise BadItemError("wrong type", "instruction, input and output must be strings")
    prompt, output = user_text(values[0], values[1]), values[2]
    if not prompt:
        raise BadItemError("empty prompt", "instruction and input are both empty")
    if not output.strip():
        raise BadItemError("empty response", "the response ('output') is empty")
    return ("user", prompt), ("assistant", output)


def _prompt_completion(item: dict[str, Any]) -> tuple[Turns, int]:
    _require(item, "prompt", "completion")
    prompt, completion = item["prompt"], item["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt.strip():
            raise BadItemError("empty prompt", "the prompt is empty")
        if not completion.strip():
            raise BadItemError("empty response", "the response ('completion') is empty")
        return (("user", prompt), ("assistant", completion)), 0
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise BadItemError("wrong type", "prompt and completion must both be strings, or both lists of messages")
    roles = dict(zip(ROLES, ROLES, strict=True))
    given = _turns(item, "prompt", "role", "content", roles)
    return _conversation(given + _turns(item, "completion", "role", "content", roles)), len(given)


def _require(item: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in item:
            raise BadItemError("missing key", f"the item has no '{key}' (its keys: {', '.join(sorted(item))})")


def _turns(item: dict[str, Any], key: str, role_key: str, content_key: str, roles: dict[str, str]) -> Turns:
    given = item.get(key)
    if not isinstance(given, list) or not given:
        raise BadItemError("wrong type", f"'{key}' must be a list of turns with a {role_key} and a {content_key}")
    turns = []
    for index, turn in enumerate(given):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        content = turn.get(content_key) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in roles or not isinstance(content, str):
            raise BadItemError(
                "bad turn",
                f"turn {index} needs a {role_key} ({', '.join(roles)}) and a {content_key} that is a string",
            )
        turns.append((roles[role], content))
    return tuple(turns)


def _conversation(turns: Turns) -> Turns:
    for index, (role, content) in enumerate(turns):
        if role == "assistant" and not content.strip():
            raise BadItemError("empty response", f"the response in turn {index} is empty")
    if turns[-1][0] != "assistant":
        raise BadItemError(
            "no last response",
            f"the last turn is the {turns[-1][0]}'s; it must be the assistant's, the response to learn",
        )
    first = next(role for role, _ in turns if role != "system")
    if first != "user":
        raise BadItemError(
            "first turn not the user's", f"the first turn (after a system turn) is the {first}'s; it must be the user's"
        )
    return turns
