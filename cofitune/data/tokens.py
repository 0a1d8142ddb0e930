"""From a rendered response to tokens: which of them are the prompt's, the response's text, and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cofitune.data.control import control_tokens
from cofitune.data.formats import BadItemError
from cofitune.data.responses import Response
from cofitune.data.shape import remembered

Offsets = list[tuple[int, int]]
LONGEST_KEPT = 200  # characters between a control token and a response, beyond which nothing is remembered
ANCHORS = ("", "\n", "a", ".")  # texts behind which a text is tokenized as if it stood alone


@dataclass(frozen=True)
class Bounds:
    """Places of one response among tokens.

    Attributes:
        start: its first token, which a generation begins with.
        content, content_end: the tokens of the given text: the first that holds a part of it, and behind the last.
        end: behind the token that ends the turn.
    """

    start: int
    content: int
    content_end: int
    end: int


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Offsets]:
    """Token ids of a rendered text, and the characters that each stands for."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return list(encoded["input_ids"]), [tuple(offset) for offset in encoded["offset_mapping"]]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered text."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, response: Response, where: str) -> tuple[list[int], Bounds]:
    """The tokens of a conversation up to a response: those of the prompt are the ones that a generation starts from.

    Where a token lies astride the prompt and the response, both are tokenized apart, as they are when the model is
    asked: it reads the prompt's tokens and continues from there.

    Raises:
        BadItemError: the two cannot be tokenized apart.
    """
    ids, offsets = tokenize(tokenizer, response.text)
    found = bounds(tokenizer, response, ids, offsets)
    if found is not None:
        return ids, found
    prompt = token_ids(tokenizer, response.prompt)
    rest = _tokenize_behind(tokenizer, prompt, response.text[response.start :])
    if rest is None:
        raise BadItemError(
            "no token boundary",
            f"{where}: this tokenizer cannot tokenize the response apart from the generation prompt "
            f"{response.prompt[-20:]!r}; name a file in data.template whose generation prompt ends with a line break",
        )
    ids = prompt + rest[0]
    offsets = [(0, 0)] * len(prompt) + [(a + response.start, b + response.start) for a, b in rest[1]]
    return ids, _bounds(response, len(prompt), offsets)


def bounds(
    tokenizer: PreTrainedTokenizerBase, response: Response, ids: Sequence[int], offsets: Offsets
) -> Bounds | None:
    """Find a response among the tokens of a text that begins with its own; None where the prompt's tokens differ."""
    start = _end_of_prompt(tokenizer, response, ids, offsets)
    return None if start is None else _bounds(response, start, offsets)


def _bounds(response: Response, start: int, offsets: Offsets) -> Bounds:
    """Tokens without characters of their own belong where they stand: their offsets say nothing."""
    content = content_end = end = start
    for index in range(start, len(offsets)):
        first, last = offsets[index]
        if first >= last:
            continue
        if first >= response.end:
            break
        if last <= response.end:
            end = index + 1
        if last <= response.content:
            content = index + 1
        if first < response.content_end:
            content_end = index + 1
    while content < content_end - 1 and offsets[content][0] >= offsets[content][1]:
        content += 1
    return Bounds(start, content, max(content_end, content), end)


def _end_of_prompt(
    tokenizer: PreTrainedTokenizerBase, response: Response, ids: Sequence[int], offsets: Offsets
) -> int | None:
    """How many of the tokens are the prompt's; None where the prompt alone is tokenized otherwise."""
    behind = next((i for i, (a, b) in enumerate(offsets) if b > response.start and a < b), len(ids))
    if behind < len(ids) and offsets[behind][0] < response.start:
        return None  # astride
    special = _control_ids(tokenizer)
    last = next((i for i in range(behind - 1, -1, -1) if ids[i] in special and offsets[i][1] <= response.start), None)
    # a control token parts what stands before it from what stands behind it
    from_here = 0 if last is None else last
    expected = _known_ids(tokenizer, response.text[offsets[from_here][0] if last is not None else 0 : response.start])
    stop = from_here + len(expected)
    if list(ids[from_here:stop]) != expected or stop > behind:
        return None
    if any(offsets[i][0] < offsets[i][1] for i in range(stop, behind)):
        return None
    return stop


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return remembered(tokenizer, "control ids", lambda: frozenset(control_tokens(tokenizer).values()))


def _known_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids, remembered where the text is short: what stands between a control token and a response repeats."""
    if len(text) > LONGEST_KEPT:
        return token_ids(tokenizer, text)
    return remembered(tokenizer, ("ids", text), lambda: token_ids(tokenizer, text))


def _tokenize_behind(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str
) -> tuple[list[int], Offsets] | None:
    """Tokens of a text that stands behind others, so that all together say the same; None where none are found.

    Some tokenizers begin every text with a space: an anchor in front takes it.
    """
    before = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    for anchor in ANCHORS:
        known = token_ids(tokenizer, anchor) if anchor else []
        ids, offsets = tokenize(tokenizer, anchor + text)
        rest, moved = ids[len(known) :], [(a - len(anchor), b - len(anchor)) for a, b in offsets[len(known) :]]
        if ids[: len(known)] != known or (moved and moved[0][0] < 0):
            continue
        if tokenizer.decode(prompt + rest, clean_up_tokenization_spaces=False) == before + text:
            return rest, moved
    return None
