"""What a model is asked, as it was taught: the prompt's tokens, and those of an answer given to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cofitune.data.control import check_contents
from cofitune.data.formats import BadItemError
from cofitune.data.responses import check_turns, find_response
from cofitune.data.shape import Messages, marked, remembered, system_advice
from cofitune.data.template import render
from cofitune.data.tokens import encode_response, token_ids

# beginnings of answers: what they all are tokenized behind is the same for every answer
PROBES = ("a", "The", "Z", "7", "(A)", '"q"', "-", "é", "漢", "<b>")


@dataclass(frozen=True)
class Prompt:
    """What an answer is generated from.

    Attributes:
        text: the rendered conversation, the generation prompt, and what the template opens every response with.
        ids: its tokens.
    """

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class GivenAnswer:
    """An answer that is scored and not generated.

    Attributes:
        context: tokens before it: those of the prompt, and of what the template opens every response with.
        ids: the answer's tokens, as training learns them; its end of turn is not among them.
    """

    context: tuple[int, ...]
    ids: tuple[int, ...]


def make_prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, opened: bool = True
) -> Prompt:
    """A prompt as the model sees it, up to where its answer begins.

    Some templates open every response alike, with an empty thought for one, and do not say so in their generation
    prompt: a model that was taught so would write that first, and its base something else. Both are given it.

    Args:
        messages: turns, the last one the user's.
        opened: whether to give what the template opens every response with; false: the model is to think by itself.

    Raises:
        BadItemError: the template refuses or drops a turn, or a text holds a control token.
    """
    check_contents(tokenizer, messages, where)
    try:
        text = render(tokenizer, messages, add_generation_prompt=True)
        check_turns(tokenizer, messages, text, where)
        opening = _opening(tokenizer, tuple(str(m["role"]) for m in messages)) if opened else Prompt("", ())
    except TemplateError as error:
        raise BadItemError(
            "refused by the template",
            f"{where}: the model's chat template refuses this prompt: {error}{system_advice(tokenizer, messages)}",
        ) from error
    return Prompt(text + opening.text, (*token_ids(tokenizer, text), *opening.ids))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: str, where: str) -> GivenAnswer:
    """The tokens of an answer behind its prompt: the very ones that training learns of this response.

    Raises:
        BadItemError: as in training: the template refuses or drops a part, or a text holds a control token.
    """
    whole: list[Mapping[str, object]] = [*messages, {"role": "assistant", "content": answer}]
    check_contents(tokenizer, whole, where)
    try:
        ids, found = encode_response(tokenizer, find_response(tokenizer, whole, where), where)
    except TemplateError as error:
        raise BadItemError(
            "refused by the template", f"{where}: the model's chat template refuses this item: {error}"
        ) from error
    return GivenAnswer(tuple(ids[: found.content]), tuple(ids[found.content : found.content_end]))


def fixed_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template opens every response to a user's turn with behind the generation prompt; often nothing."""
    return _opening(tokenizer, ("user",)).text


def _opening(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> Prompt:
    """What every response begins with behind the generation prompt: only tokens that no answer changes."""

    def find_out() -> Prompt:
        try:
            return _find_opening(tokenizer, marked([{"role": role} for role in roles]))
        except (TemplateError, BadItemError):  # a given response has no place there, so that nothing opens it
            return Prompt("", ())

    return remembered(tokenizer, ("opening", roles), find_out)


def _find_opening(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]]) -> Prompt:
    ids: list[int] | None = None
    text = ""
    for probe in PROBES:
        response = find_response(tokenizer, [*messages, {"role": "assistant", "content": probe}], "the template")
        opening = response.text[response.start : response.content]
        if not opening.strip():  # white space may be a part of the answer's first token
            return Prompt("", ())
        tokens, found = encode_response(tokenizer, response, "the template")
        mine = tokens[found.start : found.content]
        ids = mine if ids is None else ids[: next((i for i, t in enumerate(ids) if mine[i : i + 1] != [t]), len(ids))]
        text = opening
    given = tokenizer.decode(ids or [], clean_up_tokenization_spaces=False)
    return Prompt(given, tuple(ids or ())) if text.startswith(given) else Prompt("", ())
