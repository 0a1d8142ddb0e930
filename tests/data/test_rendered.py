"""Tools, calls and reasoning reach the tokens, or the template that drops them is named."""

from __future__ import annotations

from typing import Any

import pytest

from cofitune.data.chat import encode_rows
from cofitune.data.read import ItemCounts
from cofitune.errors import DataError

ASK, ANSWER = {"role": "user", "content": "Who won?"}, {"role": "assistant", "content": "The buyer."}
TOOL = {"type": "function", "function": {"name": "find_case", "parameters": {"type": "object", "properties": {}}}}
CALLS = [{"type": "function", "function": {"name": "find_case", "arguments": {"name": 'Smith "v" Jones & Co'}}}]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(tokenizer: Any, item: dict[str, Any], **settings: Any) -> tuple[list[str], ItemCounts]:
    """The learned text of each example, and the account."""
    account = ItemCounts()
    rows = [("d.jsonl:1", item)]
    options = {"max_length": 4096, "train_on": "response", "on_bad_item": "error", **settings}
    examples = [e for item in encode_rows(rows, "auto", tokenizer, account=account, **options) for e in item]
    return [tokenizer.decode([i for i in e.labels if i >= 0]) for e in examples], account


def test_a_call_is_learned_as_the_template_writes_it(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = WITH_TOOLS
    (text,), _ = learned(tiny_tokenizer, {"tools": [TOOL], "messages": [ASK, {**ANSWER, "tool_calls": CALLS}], "id": 7})
    assert text.startswith("The buyer.<call>") and "find_case" in text and text.endswith("</call><|im_end|>")
    (text,), account = learned(
        tiny_tokenizer, {"messages": [ASK, {**ANSWER, "reasoning_content": "I read it."}], "id": 1}
    )
    assert text == "<think>I read it.</think>The buyer.<|im_end|>"
    assert account.unread == {"id": 1}


def test_a_turn_of_weight_0_is_seen_and_not_learned(tiny_tokenizer: Any) -> None:
    turns = [ASK, {"role": "assistant", "content": "The seller.", "weight": 0}, ASK, {**ANSWER, "weight": 1}]
    (text,), _ = learned(tiny_tokenizer, {"messages": turns})
    assert text == "The buyer.<|im_end|>"


DROPPED = [
    ({"tools": [TOOL], "messages": [ASK, ANSWER]}, "leaves out the tool 'find_case'"),
    ({"messages": [ASK, {**ANSWER, "tool_calls": CALLS}]}, "leaves out the tool call in turn 1"),
    ({"messages": [ASK, {**ANSWER, "reasoning_content": "I read it."}]}, "leaves out reasoning_content of turn 1"),
    ({"tools": [{"x": 1}], "messages": [ASK, ANSWER]}, "a tool needs a function with a name"),
]


@pytest.mark.parametrize(("item", "message"), DROPPED)
def test_a_template_that_drops_what_was_given_is_named(tiny_tokenizer: Any, item: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^d\.jsonl:1: .*{message}"):
        learned(tiny_tokenizer, item)
    _, account = learned(tiny_tokenizer, item, on_bad_item="drop")
    assert (account.dropped, account.kept, account.unread) == (1, 0, {})


def test_a_template_without_the_role_of_tools_is_named(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] != 'tool' %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [ASK, ANSWER, {"role": "tool", "content": "Smith"}, ANSWER]
    with pytest.raises(DataError, match="leaves out the tool's answer in turn 2"):
        learned(tiny_tokenizer, {"messages": turns})
