"""From a conversation to tokens and labels: the chat template, and which tokens carry the loss."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, ItemCounts, Row, bad_item, make_item
from cofitune.data.rendered import check_rendered
from cofitune.data.top_k import TopK
from cofitune.errors import UserError

IGNORED = -100  # the label that torch's cross-entropy skips
PLAIN_TEMPLATE = (  # every marker ends with a line break, so that no token straddles the prompt and the response
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### User:\n{{ message['content'] }}\n\n"
    "{% else %}### Assistant:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


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


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Make the tokenizer speak the configured template, for training, evaluation and export alike.

    Args:
        template: chat (the model's own), plain (ours), or auto (the model's own where there is one).

    Returns:
        chat or plain, which of the two it is now.

    Raises:
        UserError: `chat` is asked of a tokenizer that has no chat template.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("data.template: this model's tokenizer has no chat template; use template: plain (or auto)")
    if template == "plain" or not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        return "plain"
    return "chat"


def encode_rows(
    rows: Iterable[tuple[str, Row]],
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on: str,
    on_bad_item: str,
    account: ItemCounts,
) -> Iterator[Example]:
    """Make rows examples, one by one; longer ones lose the end of their response. The account counts them all.

    Raises:
        DataError: under `on_bad_item: error`, the first item that is unusable, whose prompt alone fills `max_length`,
            or that the template cannot follow (file:line).
    """
    for where, row in rows:
        account.read += 1
        try:
            item = make_item(where, row, form)
            example = encode(item, tokenizer, train_on)
            if len(example.input_ids) > max_length:
                example = _cut(example, max_length, item.where)
                account.truncated += 1
        except BadItemError as error:
            bad_item(error, on_bad_item, account)
            continue
        account.kept += 1
        account.note_unread(item.unread)
        account.tokens += len(example.input_ids)
        account.supervised += example.num_supervised
        yield example


def _cut(example: Example, max_length: int, where: str) -> Example:
    cut = Example(example.input_ids[:max_length], example.labels[:max_length])
    if cut.num_supervised == 0:
        tokens = len(example.input_ids)
        raise BadItemError(
            "prompt too long",
            f"{where}: the prompt alone exceeds data.max_length {max_length} (the whole item has {tokens} tokens)",
        )
    return cut


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, train_on: str = "response") -> Example:
    """Render an item with the tokenizer's template and label its responses, end-of-turn token included.

    Raises:
        BadItemError: the template refuses the item (two user turns in a row, a system turn, …), or rewrites earlier
            turns, so that responses cannot be told apart.
    """
    try:
        return _encode(item, tokenizer, train_on)
    except TemplateError as error:
        raise BadItemError(
            "refused by the template", f"{item.where}: the model's chat template refuses this item: {error}"
        ) from error


def _encode(item: Item, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Example:
    text = render(tokenizer, item.messages(), tools=item.tools)
    check_rendered(item, text)
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids = list(encoded["input_ids"])
    if train_on == "all":
        return Example(ids, list(ids))
    offsets = encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for start, end in _response_spans(item, tokenizer, text):
        for index in range(bisect_left(offsets, start, key=lambda offset: offset[0]), len(ids)):
            first, last = offsets[index]
            if first >= end:
                break
            if first < last <= end:
                labels[index] = ids[index]
    return Example(ids, labels)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """The text that the model sees for these messages.

    Args:
        tools: JSON schemas of the tools that may be called, as transformers' templates take them.
    """
    return str(
        tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _response_spans(item: Item, tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Character ranges of the responses in `text`: from after the generation prompt through the end-of-turn token."""
    messages = item.messages()
    spans = []
    for index in range(len(messages)):
        if not item.learns(index):
            continue
        if index == 0:
            raise BadItemError(
                "first turn not the user's", f"{item.where}: the first turn is the assistant's; it must be the user's"
            )
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True, tools=item.tools)
        whole = text if index + 1 == len(messages) else render(tokenizer, messages[: index + 1], tools=item.tools)
        if not (whole.startswith(prompt) and text.startswith(whole)):
            raise BadItemError(
                "rewritten by the template",
                f"{item.where}: the model's chat template rewrites earlier turns, so the response in turn {index} "
                "cannot be told apart; give single-turn items, or use data.template: plain",
            )
        spans.append((len(prompt), _end_of_turn(whole, len(prompt), tokenizer.eos_token)))
    return spans


def _end_of_turn(whole: str, start: int, eos: str | None) -> int:
    """Leave out white space that a template writes after the end-of-turn token: a generation stops before it."""
    stripped = whole.rstrip()
    ends_with_token = eos is not None and stripped.endswith(eos)
    return max(start, len(stripped)) if ends_with_token else len(whole)


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> set[int]:
    """Tokens that end an answer: the tokenizer's, the model's own, and what its template writes after a response."""
    ends = {tokenizer.eos_token_id}
    own = getattr(generation_config, "eos_token_id", None)
    ends.update(own if isinstance(own, list) else [own])
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    after = tokenizer(whole[whole.rindex("b") + 1 :], add_special_tokens=False)["input_ids"]
    ends.update(i for i in after[:1] if i in tokenizer.all_special_ids)
    return {i for i in ends if i is not None}
