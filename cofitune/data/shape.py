"""What a chat template writes around the turns, found by rendering marks in the place of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cofitune.data.control import control_tokens
from cofitune.data.template import merges_system, render

MARK = "q7f3a9zk{}x"  # stands in for a text; no template writes it, and none trims it
Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")

_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[object, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Around:
    """What stands around a response.

    Attributes:
        opening: between the generation prompt and the response's text; empty in most templates.
        tail: behind the text.
    """

    opening: str
    tail: str


def remembered(tokenizer: PreTrainedTokenizerBase, key: object, find_out: Callable[[], T]) -> T:
    """What is known under this key of the tokenizer with its present template; the first time it is found out."""
    store = _KNOWN.setdefault(tokenizer, {})
    key = tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, key
    if key not in store:
        store[key] = find_out()
    result: T = store[key]
    return result


def mark(index: int) -> str:
    """What stands in for the text of a turn."""
    return MARK.format(index)


def marked(messages: Messages) -> list[dict[str, object]]:
    """The messages, each text a mark."""
    return [{**message, "content": mark(index)} for index, message in enumerate(messages)]


def split_at_response(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Mapping[str, object]]
) -> tuple[str, str] | None:
    """What the template writes before and behind the last message's text; None where it drops the text."""
    last = len(messages) - 1
    text = render(tokenizer, [*messages[:-1], {**messages[-1], "content": mark(last)}], tools=tools)
    head, found, tail = text.rpartition(mark(last))
    return (head, tail) if found else None


def around_response(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> Around | None:
    """What stands around the response at the end of turns of these roles; None where the two cannot be told apart."""

    def find_out() -> Around | None:
        messages = marked([{"role": role} for role in roles])
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
        parts = split_at_response(tokenizer, messages, ())
        fits = parts is not None and parts[0].startswith(prompt)
        return Around(parts[0][len(prompt) :], parts[1]) if parts is not None and fits else None

    return remembered(tokenizer, ("around", roles), find_out)


def dropped_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Mapping[str, object]] = ()
) -> list[int]:
    """Places of the turns whose text the template never writes, whatever it is."""

    def find_out() -> list[int]:
        ends_open = messages[-1]["role"] != "assistant"
        text = render(tokenizer, marked(messages), add_generation_prompt=ends_open, tools=tools)
        return [index for index, m in enumerate(messages) if m["content"] and mark(index) not in text]

    return remembered(tokenizer, ("dropped", _pattern(messages), bool(tools)), find_out)


def system_advice(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """What to do where the template drops or refuses a system turn; empty where the system turns are not the reason."""
    roles = [str(message["role"]) for message in messages]
    others = [message for message in messages if message["role"] != "system"]
    if not 0 < len(others) < len(messages):
        return ""
    try:
        render(tokenizer, others)
    except TemplateError:
        return ""
    loose = next((i for i, role in enumerate(roles) if role == "system" and _behind(roles, i) != "user"), None)
    if loose is not None:
        return f"; data.system: merge needs a user's turn behind a system turn, and turn {loose} has none"
    merged = merges_system(tokenizer)
    return "" if merged else "; data.system: merge puts a system turn in front of the user's turn behind it"


def _behind(roles: Sequence[str], index: int) -> str:
    """The role of the first turn behind this one that is no system turn; empty where there is none."""
    return next((role for role in roles[index:] if role != "system"), "")


def _pattern(messages: Messages) -> tuple[object, ...]:
    return tuple((m["role"], bool(m["content"]), *sorted(m)) for m in messages)


def next_turn_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes behind the end of every response to open the next turn, asked to or not; often nothing.

    The first Llama-3-Instruct's template did so. Mistral's write the same whether they are asked to or not, too, but
    nothing behind a response's end.
    """
    return remembered(tokenizer, "next turn's opening", lambda: _next_turn_opening(tokenizer))


def _next_turn_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = marked([{"role": "user"}, {"role": "assistant"}])
    try:
        if render(tokenizer, messages[:1]) != render(tokenizer, messages[:1], add_generation_prompt=True):
            return ""
        parts = split_at_response(tokenizer, messages, ())
    except TemplateError:
        return ""
    tail = parts[1] if parts else ""
    ends = [(tail.index(token), -len(token)) for token in control_tokens(tokenizer) if token and token in tail]
    return tail[min(ends)[0] - min(ends)[1] :] if ends else ""


def end_before_next_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a response without a control token behind it ends with, once the user's next turn begins; or nothing.

    Some templates (GLM-4's) close a turn by the next turn's own opening token, at which a generation stops.
    """
    return remembered(tokenizer, "end before next turn", lambda: _end_before_next_turn(tokenizer))


def _end_before_next_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    around = around_response(tokenizer, ("user", "assistant"))
    messages = marked([{"role": role} for role in ("user", "assistant", "user")])
    try:
        text = render(tokenizer, messages)
    except TemplateError:
        return ""
    between = text.partition(mark(1))[2].partition(mark(2))[0]
    if around is None or not between.startswith(around.tail):
        return ""
    rest = between[len(around.tail) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    starting = [token for token in control_tokens(tokenizer) if token and rest.lstrip().startswith(token)]
    return space + max(starting, key=len) if starting else ""
