"""The forms in which conversations come, each made into turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cofitune.data.turns import (
    ROLES,
    SHAREGPT_ROLES,
    BadItemError,
    Turn,
    check_text,
    json_of,
    read_tools,
    read_turn,
    shown,
)
from cofitune.data.verdicts import is_wanted

__all__ = ["BadItemError", "Conversation", "prompt_turns_of", "turns_of", "user_text"]

READ = {  # form → the keys that it reads
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
}
PREFERENCE = {"chosen", "rejected"}  # responses


@dataclass(frozen=True)
class Conversation:
    """An item of data, read.

    Attributes:
        turns: in order.
        context: how many of them at the beginning are given only, so that no response among them is learned.
        tools: JSON schemas of the tools that may be called.
        unread: names of the item's keys that nothing reads; a turn's begin with the list's.
    """

    turns: tuple[Turn, ...]
    context: int = 0
    tools: tuple[dict[str, object], ...] = ()
    unread: tuple[str, ...] = ()


def turns_of(item: Mapping[str, object], form: str) -> Conversation:
    """Read one item.

    Args:
        item: a JSON object or a table's row; a key whose value is null counts as absent, as tables fill gaps so.
        form: alpaca (instruction, input, output, system, history), messages (role, content), sharegpt (conversations
            of from, value), prompt_completion (strings, or lists of messages as TRL has them), or auto: by the item's
            keys.

    Raises:
        BadItemError: a key is missing, a value has the wrong type, a response is empty, the turns are out of order, or
            the item is of a kind that nothing is learned from here (preferences, plain text).
    """
    item, form, unread = _begin(item, form)
    if form == "alpaca":
        turns, context = [*_history(item), *_alpaca(item)], 0
    elif form == "prompt_completion":
        turns, context = _prompt_completion(item, unread)
    else:
        turns, context = _listed(item, *_list_of(form), unread), 0
    return _whole(item, form, _learned(turns, context), context, unread)


def prompt_turns_of(item: Mapping[str, object], form: str) -> Conversation:
    """Read one item as a prompt alone: its turns up to a user's, the last response left out where there is one.

    Args:
        item, form: as `turns_of` takes them; of alpaca the output may be missing, of prompt_completion the completion.

    Raises:
        BadItemError: a key is missing, a value has the wrong type, there is no user's turn at the end, or the prompt
            comes with tools.
    """
    item, form, unread = _begin(item, form, is_prompt=True)
    if form == "alpaca":
        _require(item, "instruction")
        turns = [*_history(item), Turn("user", user_text(_string(item, "instruction"), _string(item, "input")))]
    elif form == "prompt_completion":
        _require(item, "prompt")
        given = item["prompt"]
        turns = [Turn("user", given)] if isinstance(given, str) else _listed(item, "prompt", "role", "content", unread)
    else:
        turns = _listed(item, *_list_of(form), unread)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise BadItemError(
            "no prompt at the end",
            "a prompt ends with the user's turn (a last response is left out); "
            + (f"this one ends with the {turns[-1].role}'s" if turns else "this one has no turn but a response"),
        )
    if not turns[-1].content.strip():
        raise BadItemError("empty prompt", "the prompt is empty")
    _check_first(turns)
    whole = _whole(item, form, turns, 0, unread)
    if whole.tools:
        raise BadItemError("prompt with tools", "a prompt with 'tools' cannot be rehearsed: its answer is a call")
    return whole


def user_text(instruction: str, given: str = "") -> str:
    """The user's turn of an instruction item: the instruction, and below it the input where there is one.

    Training and evaluation both go through here, so that a model is asked as it was taught.
    """
    return "\n".join(part for part in (instruction.strip(), given.strip()) if part)


def _begin(
    given: Mapping[str, object], form: str, *, is_prompt: bool = False
) -> tuple[dict[str, object], str, list[str]]:
    """The item without its gaps, its form, and its keys that the form does not read.

    Args:
        is_prompt: the response is left out, so that what `label` says of it is no matter.
    """
    item = {key: value for key, value in given.items() if value is not None}
    if item.keys() >= PREFERENCE:
        if is_prompt and (prompt := _prompt_of_preference(item)):
            return _begin(prompt, form, is_prompt=True)
        raise BadItemError(
            "preference data",
            "'chosen' and 'rejected' are preferences, and cofitune learns from responses; keep the chosen answer as "
            "'completion' beside its 'prompt', or as the last of 'messages'",
        )
    form = _guess(item) if form == "auto" else form
    judged = not is_prompt and is_wanted(given, form)
    read = (*READ[form], "label") if judged else READ[form]
    return item, form, [key for key in item if key not in read]


def _prompt_of_preference(item: Mapping[str, object]) -> dict[str, object]:
    """The prompt of a preference: its own, or what both conversations begin with; empty where there is none."""
    rest = {key: value for key, value in item.items() if key not in PREFERENCE}
    if rest.keys() & {"prompt", "messages", "conversations", "instruction"}:
        return rest
    return rest | {"messages": item["chosen"]} if isinstance(item["chosen"], list) else {}


def _guess(item: Mapping[str, object]) -> str:
    for key, form in (
        ("messages", "messages"),
        ("conversations", "sharegpt"),
        ("instruction", "alpaca"),
        ("prompt", "prompt_completion"),
    ):
        if key in item:
            return form
    if "text" in item:
        raise BadItemError(
            "plain text",
            "this is plain text ('text'), and cofitune learns responses to prompts: an item has 'messages', "
            "'instruction' and 'output', or 'prompt' and 'completion'",
        )
    raise BadItemError(
        "unknown keys",
        "an item has 'messages', 'conversations', 'instruction' and 'output', or 'prompt' and 'completion'; this one "
        f"has {sorted(map(str, item))}{_small_letters(item)}",
    )


def _small_letters(item: Mapping[str, object]) -> str:
    """What to say of keys that would be read if they were written in small letters."""
    known = {name for names in READ.values() for name in names}
    wrong = next((key for key in map(str, item) if key not in known and key.lower() in known), None)
    return f"; '{wrong}' is read where it is written '{wrong.lower()}'" if wrong else ""


def _list_of(form: str) -> tuple[str, str, str]:
    return ("conversations", "from", "value") if form == "sharegpt" else ("messages", "role", "content")


def _alpaca(item: Mapping[str, object]) -> list[Turn]:
    _require(item, "instruction", "output")
    prompt = user_text(_string(item, "instruction"), _string(item, "input"))
    output = _string(item, "output")
    if not prompt:
        raise BadItemError("empty prompt", "instruction and input are both empty")
    if not output.strip():
        raise BadItemError("empty response", "the response ('output') is empty")
    return [Turn("user", prompt), Turn("assistant", output)]


def _string(item: Mapping[str, object], key: str) -> str:
    value = item.get(key, "")
    if not isinstance(value, str):
        raise BadItemError(
            "wrong type", f"instruction, input and output must be strings; '{key}' is {value!r:.60}, no text"
        )
    return value


def _history(item: Mapping[str, object]) -> list[Turn]:
    """Earlier turns of an alpaca item: pairs of what the user said and what was answered, learned like the last one."""
    history = item.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise BadItemError("wrong type", "'history' must be a list of pairs of strings: instruction and answer")
    return [Turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]


def _prompt_completion(item: Mapping[str, object], unread: list[str]) -> tuple[list[Turn], int]:
    _require(item, "prompt", "completion")
    prompt, completion = item["prompt"], item["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt.strip():
            raise BadItemError("empty prompt", "the prompt is empty")
        if not completion.strip():
            raise BadItemError("empty response", "the response ('completion') is empty")
        return [Turn("user", prompt), Turn("assistant", completion)], 0
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise BadItemError("wrong type", "prompt and completion must both be strings, or both lists of messages")
    given = _listed(item, "prompt", "role", "content", unread)
    return given + _listed(item, "completion", "role", "content", unread), len(given)


def _require(item: Mapping[str, object], *keys: str) -> None:
    for key in keys:
        if key not in item:
            raise BadItemError(
                "missing key",
                f"the item has no '{key}' (its keys: {', '.join(sorted(map(str, item)))}){_small_letters(item)}",
            )


def _listed(item: Mapping[str, object], key: str, role_key: str, content_key: str, unread: list[str]) -> list[Turn]:
    given = item.get(key)
    if isinstance(given, str):  # a column of a table holds texts
        given = json_of(given)
    if not isinstance(given, list) or not given:
        raise BadItemError("wrong type", f"'{key}' must be a list of turns with a {role_key} and a {content_key}")
    own_key, content_key = _keys_of_turns(given, role_key, content_key)
    roles, role_key = SHAREGPT_ROLES if "from" in (role_key, own_key) else ROLES, own_key
    read = [read_turn(index, turn, role_key, content_key, roles) for index, turn in enumerate(given)]
    unread += dict.fromkeys(f"{key}[].{name}" for _, names in read for name in names)
    return [turn for turn, _ in read]


def _keys_of_turns(given: list[object], role_key: str, content_key: str) -> tuple[str, str]:
    """Under which keys the turns hold role and text: some data write `conversations` with role and content."""
    turns = [turn for turn in given if isinstance(turn, dict)]
    for keys in (("from", "value"), ("role", "content")):
        if turns and all(keys[0] in turn and role_key not in turn for turn in turns):
            return keys
    return role_key, content_key


def _learned(turns: list[Turn], context: int) -> list[Turn]:
    """Check that a response stands last, that none is empty, and that one at least is learned."""
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.content.strip() and not turn.extra:
            raise BadItemError("empty response", f"the response in turn {index} is empty")
    if turns[-1].role != "assistant":
        raise BadItemError(
            "no last response",
            f"the last turn is the {turns[-1].role}'s; it must be the assistant's, the response to learn",
        )
    if not any(turn.learn for turn in turns[context:] if turn.role == "assistant"):
        raise BadItemError(
            "nothing to learn", "no response is left to learn: each has weight 0, or train or loss false"
        )
    _check_first(turns)
    return turns


def _check_first(turns: list[Turn]) -> None:
    first = next(turn.role for turn in turns if turn.role != "system")
    if first != "user":
        raise BadItemError(
            "first turn not the user's", f"the first turn (after a system turn) is the {first}'s; it must be the user's"
        )


def _whole(item: Mapping[str, object], form: str, turns: list[Turn], context: int, unread: list[str]) -> Conversation:
    """Put the item's own system text in front, and check that every text can be encoded."""
    system = item.get("system", "")
    if not isinstance(system, str):
        raise BadItemError("wrong type", f"'system' must be a string, not {system!r:.60}")
    own = [turn.content for turn in turns if turn.role == "system"]
    if system.strip() and system not in own:
        if own:
            raise BadItemError("two system texts", "the item has a 'system' text and a system turn that says another")
        turns, context = [Turn("system", system), *turns], context + (1 if context else 0)
    tools = read_tools(item["tools"]) if "tools" in READ[form] and "tools" in item else ()
    for index, turn in enumerate(turns):
        check_text(turn.content, f"the {turn.role}'s turn {index}")
        if turn.extra:
            check_text(turn.extra, f"the {turn.role}'s turn {index}")
    if tools:
        check_text(tools, "'tools'")
    return Conversation(tuple(turns), context, tools, tuple(map(shown, unread)))
