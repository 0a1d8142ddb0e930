"""Where a response stands in a rendered conversation: the one rule for training, evaluation, drift and rehearsal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cofitune.data.control import control_tokens
from cofitune.data.formats import BadItemError
from cofitune.data.shape import (
    Messages,
    around_response,
    dropped_turns,
    end_before_next_turn,
    next_turn_opening,
    split_at_response,
    system_advice,
)
from cofitune.data.template import render

OPENS = re.compile(r"<\|?(think|thinking|thought|reasoning)\|?>|\[THINK\]")
CLOSES = re.compile(r"<\|?/(think|thinking|thought|reasoning)\|?>|\[/THINK\]")


@dataclass(frozen=True)
class Response:
    """A conversation up to a response, as the template writes it. Places are counted in characters.

    Attributes:
        text: the rendered conversation, the response at its end.
        start: where a generation begins, right behind the generation prompt.
        content: where the given response's own text begins: behind what the template opens every response with.
        content_end: where it ends.
        end: behind the token that ends the turn; what lies between `start` and here is learned.
        ends_with_token: whether the turn ends with a control token, at which a generation stops.
    """

    text: str
    start: int
    content: int
    content_end: int
    end: int
    ends_with_token: bool

    @property
    def prompt(self) -> str:
        """What a generation starts from."""
        return self.text[: self.start]


def find_response(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, tools: Sequence[Mapping[str, object]] = ()
) -> Response:
    """Render a conversation that ends with a response, and find the response in it.

    Raises:
        BadItemError: the template drops a part of a turn, opens a thought that the response does not have, or writes a
            response otherwise than its generation prompt begins one.
        jinja2.TemplateError: the template refuses the conversation.
    """
    turn = len(messages) - 1
    if turn == 0:
        raise BadItemError(
            "first turn not the user's", f"{where}: the first turn is the assistant's; it must be the user's"
        )
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True, tools=tools)
    whole = render(tokenizer, messages, tools=tools)
    check_turns(tokenizer, messages, whole, where, tools)
    content, content_end = _find_content(tokenizer, messages, whole, prompt, where, tools)
    text, shift = _behind_prompt(whole, prompt, content, where, turn)
    return _with_end(tokenizer, text, len(prompt), content + shift, content_end + shift)


def check_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    text: str,
    where: str,
    tools: Sequence[Mapping[str, object]] = (),
) -> None:
    """Check that every turn's text stands in the rendered conversation, white space aside.

    Of an earlier response the template may leave out the reasoning, as the model will see it.

    Raises:
        BadItemError: a turn or a part of one is missing.
    """
    for index in dropped_turns(tokenizer, messages, tools):
        role = messages[index]["role"]
        if role == "tool":  # check_rendered knows how templates write a tool's answer
            continue
        advice = system_advice(tokenizer, messages) if role == "system" else ""
        raise BadItemError(
            f"{role} turn dropped by the template",
            f"{where}: the chat template drops the {role}'s turn {index}: {_short(messages[index]['content'])}{advice}",
        )
    at, squeezed = 0, squeeze(text)
    for index, message in enumerate(messages[:-1] if messages[-1]["role"] == "assistant" else messages):
        if message["role"] == "tool":
            continue
        wanted = squeeze(message["content"])
        if message["role"] == "assistant":
            wanted = wanted.rpartition("</think>")[2]
        found = squeezed.find(wanted, 0 if message["role"] == "system" else at)
        if found < 0:
            raise _dropped(message["content"], text, message["role"], index, where)
        at = at if message["role"] == "system" else found + len(wanted)


def shared_length(*texts: str) -> int:
    """Characters that the texts begin with alike."""
    low, high = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(map(len, (low, high))))


def squeeze(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _find_content(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    whole: str,
    prompt: str,
    where: str,
    tools: Sequence[Mapping[str, object]],
) -> tuple[int, int]:
    """Where the last message's text begins and ends in `whole`."""
    given = str(messages[-1]["content"])
    if not given.strip():  # tool calls or reasoning alone
        begin = shared_length(prompt, whole)
        return begin, begin
    plain = not tools and all(message.keys() <= {"role", "content"} for message in messages)
    known = around_response(tokenizer, tuple(str(m["role"]) for m in messages)) if plain else None
    if known and whole.startswith(prompt) and (found := _between(whole, prompt + known.opening, known.tail, given)):
        return found
    parts = split_at_response(tokenizer, messages, tools)
    if parts is not None and (found := _between(whole, *parts, given)):
        return found
    # the template writes what stands around a response by what the response says, or moves its parts
    tail = parts[1] if parts is not None and whole.endswith(parts[1]) else ""
    before = render(tokenizer, messages[:-1], tools=tools)
    lower = shared_length(before, prompt, whole)
    found = _find_squeezed(whole[lower : len(whole) - len(tail)], given)
    if found is None:
        behind = shared_length(prompt, whole)
        raise _dropped(given, whole[behind : len(whole) - len(tail)], "assistant", len(messages) - 1, where)
    return lower + found[0], lower + found[1]


def _between(whole: str, head: str, tail: str, given: str) -> tuple[int, int] | None:
    """Where the text stands between a head and a tail, if it is all that stands there."""
    if len(whole) < len(head) + len(tail) or not (whole.startswith(head) and whole.endswith(tail)):
        return None
    body = whole[len(head) : len(whole) - len(tail)]
    if body != given and squeeze(body) != squeeze(given):
        return None
    begin = len(head) + len(body) - len(body.lstrip()) if body != given else len(head)
    return begin, len(whole) - len(tail)


def _find_squeezed(text: str, given: str) -> tuple[int, int] | None:
    """Where `given` first stands in `text`, white space aside."""
    kept = [index for index, character in enumerate(text) if not character.isspace()]
    wanted = squeeze(given)
    at = "".join(text[index] for index in kept).find(wanted)
    return None if at < 0 else (kept[at], kept[at + len(wanted) - 1] + 1)


def _behind_prompt(whole: str, prompt: str, content: int, where: str, turn: int) -> tuple[str, int]:
    """The conversation with the response right behind the generation prompt, and by how much the response moved."""
    if whole.startswith(prompt):
        return whole, 0
    shared = shared_length(prompt, whole)
    if content < shared and not OPENS.search(whole[content:shared]):  # "<b>" and "<think>" begin alike
        shared = content
    asked, written = prompt[shared:], whole[shared:content] if content > shared else ""
    begin = max(content, shared)
    if content < shared and asked.strip():
        raise BadItemError(
            "reasoning where none is asked for",
            f"{where}: turn {turn}'s response has reasoning, and the chat template asks without reasoning (generation "
            f"begins behind {asked!r}); change data.chat_template_kwargs, or give the response alone",
        )
    if len(OPENS.findall(asked)) > len(CLOSES.findall(asked)) and written.strip() == "":
        raise BadItemError(
            "no reasoning",
            f"{where}: the chat template lets a generation begin with {asked!r}, but writes turn {turn}'s response "
            "without any reasoning; give the reasoning, or ask without it (data.chat_template_kwargs, for example "
            "enable_thinking: false), or name a file in data.template",
        )
    if written.strip():
        raise BadItemError(
            "generation prompt unlike the response",
            f"{where}: the chat template lets a generation begin with {asked!r}, but begins turn {turn}'s response "
            f"with {written!r}; name a file in data.template in which the two agree",
        )
    return prompt + whole[begin:], len(prompt) - begin


def _with_end(tokenizer: PreTrainedTokenizerBase, text: str, start: int, content: int, content_end: int) -> Response:
    """Find the end: behind the last control token that follows the text; white space behind it is not generated.

    Where the template always opens the next turn, that opening is not the response's.
    """
    rest = text[content_end:].removesuffix(next_turn_opening(tokenizer))
    ends = [rest.rindex(token) + len(token) for token in control_tokens(tokenizer) if token and token in rest]
    if ends:
        return Response(text, start, content, content_end, content_end + max(ends), True)
    added = end_before_next_turn(tokenizer)
    return Response(text + added, start, content, content_end, len(text + added), bool(added))


def _dropped(given: str, text: str, role: str, turn: int, where: str) -> BadItemError:
    """Name what a template dropped of a text: what lies between the parts of it that are there."""
    wanted, squeezed = given.strip(), squeeze(text)

    def longest(parts: Sequence[str]) -> int:  # each part holds the one before
        low, high = 0, len(parts)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if squeeze(parts[middle - 1]) in squeezed else (low, middle - 1)
        return low

    tail = longest([wanted[-n:] for n in range(1, len(wanted) + 1)])
    head = longest([wanted[:n] for n in range(1, len(wanted) - tail + 1)])
    lost = wanted[head : len(wanted) - tail].strip() or wanted
    return BadItemError(
        "text dropped by the template", f"{where}: the chat template drops {_short(lost)} from the {role}'s turn {turn}"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")
