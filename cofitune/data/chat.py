"""From a conversation to tokens and labels: the chat template, and which tokens carry the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cofitune.data.control import check_contents, control_tokens
from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, ItemCounts, Row, bad_item, make_item
from cofitune.data.rendered import check_rendered
from cofitune.data.responses import CLOSES, Response, check_turns, find_response
from cofitune.data.shape import end_before_next_turn, marked, split_at_response, system_advice
from cofitune.data.template import PLAIN_TEMPLATE, ChatTemplate, render, set_template
from cofitune.data.tokens import Bounds, bounds, encode_response, tokenize
from cofitune.data.top_k import TopK
from cofitune.data.turns import REASONING

__all__ = [
    "IGNORED", "PLAIN_TEMPLATE", "ChatTemplate", "EncodedItem", "Example", "LazyExamples", "encode", "encode_item",
    "encode_rows", "end_ids", "render", "set_template", "template_ends",
]  # fmt: skip

IGNORED = -100  # the label that torch's cross-entropy skips
CONVERSATION = "conversation"  # as `all`, for who reads no labels: no response that is not learned need be found


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation, and a label each: the id itself where it carries the loss, else -100. Both [T].

    Attributes:
        parts: of a pack, the tokens of each conversation in it, in order; empty for a single one.
        top_k: of the base's own answers, its stored probabilities at each token that carries the loss, in order.
    """

    input_ids: list[int]
    labels: list[int]
    parts: tuple[int, ...] = ()
    top_k: TopK | None = None

    @property
    def num_supervised(self) -> int:
        """Tokens that carry the loss. The first token of all is never predicted, so it never counts."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)


class LazyExamples(Sequence[Example]):
    """Examples that are made when they are asked for; those of a slice all at once."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(len(self)))]
        return self.example(index)

    @abstractmethod
    def example(self, index: int) -> Example:
        """One of them."""


def encode_rows(
    rows: Iterable[tuple[str, Row]],
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on: str,
    on_bad_item: str,
    account: ItemCounts,
) -> Iterator[list[Example]]:
    """Make each row's examples, one by one; longer ones lose the end of their response. The account counts them all.

    Yields:
        The examples of one item: one, or one a response where the template rewrites earlier turns.

    Raises:
        DataError: under `on_bad_item: error`, the first item that is unusable, whose prompt alone fills `max_length`,
            or that the template cannot follow (file:line).
    """
    for where, row in rows:
        account.read += 1
        try:
            item = make_item(where, row, form)
            whole = encode_item(item, tokenizer, train_on)
            examples = _fit(whole.examples, max_length, item.where)
        except BadItemError as error:
            bad_item(error, on_bad_item, account)
            continue
        account.kept += 1
        account.truncated += sum(len(e.input_ids) for e in examples) < sum(len(e.input_ids) for e in whole.examples)
        account.further_examples += len(examples) - 1
        account.without_end += not whole.ends_with_token
        account.reasoning += whole.reasons
        account.tokens += sum(len(example.input_ids) for example in examples)
        account.supervised += sum(example.num_supervised for example in examples)
        account.note_unread(item.unread)
        yield examples


def _fit(examples: Sequence[Example], max_length: int, where: str) -> list[Example]:
    """Cut the examples, and leave out those of which nothing would be learned.

    Raises:
        BadItemError: none is left.
    """
    cut = [Example(e.input_ids[:max_length], e.labels[:max_length]) for e in examples]
    fitting = [example for example in cut if example.num_supervised]
    if not fitting:
        tokens = min(len(example.input_ids) for example in examples)
        raise BadItemError(
            "prompt too long",
            f"{where}: the prompt alone exceeds data.max_length {max_length} (the whole item has {tokens} tokens)",
        )
    return fitting


@dataclass(frozen=True)
class EncodedItem:
    """An item's examples.

    Attributes:
        ends_with_token: whether each of its learned responses ends with a control token, at which a generation stops.
        reasons: whether a learned response holds reasoning.
    """

    examples: tuple[Example, ...]
    ends_with_token: bool
    reasons: bool


def encode_item(item: Item, tokenizer: PreTrainedTokenizerBase, train_on: str = "response") -> EncodedItem:
    """Render an item with the tokenizer's template and label its responses, end-of-turn token included.

    A template that rewrites earlier turns (leaves out their reasoning, for one) gives an example for each response that
    is learned, rendered up to it as the model will see it.

    Raises:
        BadItemError: the template refuses the item (two user turns in a row, a system turn, …) or drops a part of it,
            or a text holds a control token.
    """
    messages = item.messages()
    check_contents(tokenizer, messages, item.where)
    try:
        if train_on in ("all", CONVERSATION):
            return EncodedItem((_whole(item, tokenizer, messages, train_on == "all"),), True, False)
        learned = [index for index in range(len(messages)) if item.learns(index)]
        responses = [_response(item, tokenizer, messages, index) for index in learned]
    except TemplateError as error:
        raise BadItemError(
            "refused by the template",
            f"{item.where}: the model's chat template refuses this item: {error}{system_advice(tokenizer, messages)}",
        ) from error
    examples = _together(tokenizer, responses) or [_alone(tokenizer, one, item.where) for one in responses]
    reasons = any(_reasons(messages[index]) for index in learned)
    return EncodedItem(tuple(examples), all(one.ends_with_token for one in responses), reasons)


def _whole(
    item: Item, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, object]], labelled: bool
) -> Example:
    """The conversation as one example, whose every token is learned but those of responses that are not to be.

    Args:
        labelled: whether anybody reads the labels; if not, such responses need not be found.
    """
    text = render(tokenizer, messages, tools=item.tools)
    check_turns(tokenizer, messages, text, item.where, item.tools)
    check_rendered(item, text)
    ids, offsets = tokenize(tokenizer, text)
    labels = list(ids)
    given = [i for i, turn in enumerate(item.turns) if turn[0] == "assistant" and not item.learns(i)]
    for index in given if labelled else ():
        response = _response(item, tokenizer, messages, index)
        found = bounds(tokenizer, response, ids, offsets) if text.startswith(response.text) else None
        if found is None:
            raise BadItemError(
                "a response cannot be left out",
                f"{item.where}: turn {index + 1} is a response that is not to be learned, and the chat template "
                "rewrites it in the whole conversation, so that data.train_on: all cannot leave it out; use "
                "data.train_on: response",
            )
        labels[found.start : found.end] = [IGNORED] * (found.end - found.start)
    return Example(ids, labels)


def _response(
    item: Item, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, object]], index: int
) -> Response:
    result = find_response(tokenizer, messages[: index + 1], item.where, item.tools)
    check_rendered(replace(item, turns=item.turns[: index + 1], extras=item.extras[: index + 1]), result.text)
    return result


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, train_on: str = "response") -> Example:
    """The one example of an item.

    Raises:
        BadItemError: as `encode_item`; or the item has several.
    """
    examples = encode_item(item, tokenizer, train_on).examples
    if len(examples) > 1:
        raise BadItemError(
            "several examples", f"{item.where}: the chat template rewrites earlier turns; each response is an example"
        )
    return examples[0]


def _together(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Response]) -> list[Example] | None:
    """One example of all responses; None where the last one's text is not each earlier one's, gone on."""
    text = responses[-1].text
    if not all(text.startswith(one.text) for one in responses[:-1]):
        return None
    ids, offsets = tokenize(tokenizer, text)
    found = [bounds(tokenizer, one, ids, offsets) for one in responses]
    if any(one is None for one in found):
        return None
    return [_example(ids, [one for one in found if one is not None])]


def _alone(tokenizer: PreTrainedTokenizerBase, response: Response, where: str) -> Example:
    ids, found = encode_response(tokenizer, response, where)
    return _example(ids, [found])


def _example(ids: list[int], found: Sequence[Bounds]) -> Example:
    labels = [IGNORED] * len(ids)
    for one in found:
        labels[one.start : one.end] = ids[one.start : one.end]
    return Example(ids, labels)


def _reasons(message: Mapping[str, Any]) -> bool:
    return any(message.get(key) for key in REASONING) or bool(CLOSES.search(message["content"]))


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> set[int]:
    """Tokens that end an answer: the tokenizer's, the model's own, and what its template writes after a response."""
    ends = {tokenizer.eos_token_id}
    own = getattr(generation_config, "eos_token_id", None)
    ends.update(own if isinstance(own, list) else [own])
    ends.update(template_ends(tokenizer))
    return {i for i in ends if i is not None}


def template_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The control token that the template writes first behind a response, if there is one."""
    try:
        parts = split_at_response(tokenizer, marked([{"role": "user"}, {"role": "assistant"}]), ())
    except TemplateError:
        return set()
    controls = control_tokens(tokenizer)
    tail = parts[1] if parts else ""
    written = tail if any(token in tail for token in controls if token) else tail + end_before_next_turn(tokenizer)
    places = [(written.find(token), -len(token), i) for token, i in controls.items() if token and token in written]
    return {min(places)[2]} if places else set()
