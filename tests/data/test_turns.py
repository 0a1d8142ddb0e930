"""What people's data say beside role and text: system texts, history, weights, tools, reasoning, keys nobody reads."""

from __future__ import annotations

from typing import Any

import pytest

from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, ItemCounts, make_item, make_prompt, parse
from cofitune.evaluation.items import EvalTask, unread_keys

ASK, ANSWER = {"role": "user", "content": "Who won?"}, {"role": "assistant", "content": "The buyer."}
TOOL = {"type": "function", "function": {"name": "find_case", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find_case", "arguments": {"year": "1999"}}}


def read(item: Any, form: str = "auto") -> Item:
    return make_item("d.jsonl:1", item, form)


def test_alpaca_system_and_history_become_turns_in_order() -> None:
    item = read(
        {"system": "Be brief.", "history": [["Who lost?", "The seller."]], "instruction": "Who won?", "output": "Me."}
    )
    assert item.turns == (
        ("system", "Be brief."),
        ("user", "Who lost?"),
        ("assistant", "The seller."),
        ("user", "Who won?"),
        ("assistant", "Me."),
    )
    assert [item.learns(index) for index in range(5)] == [False, False, True, False, True]
    assert item.unread == ()


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [ASK, ANSWER]},
        {"conversations": [{"from": "human", "value": "Who won?"}, {"from": "gpt", "value": "The buyer."}]},
        {"prompt": "Who won?", "completion": "The buyer."},
        {"prompt": [ASK], "completion": [ANSWER]},
    ],
)
def test_a_system_text_of_the_item_stands_in_front(item: dict[str, Any]) -> None:
    read_item = read({**item, "system": "Be brief."})
    assert read_item.turns[0] == ("system", "Be brief.") and len(read_item.turns) == 3
    assert read({**item, "system": " "}).turns[0][0] == "user"
    assert [i for i in range(3) if read_item.learns(i)] == [2]


def test_two_system_texts_that_differ_are_refused() -> None:
    turns = [{"role": "system", "content": "Be brief."}, ASK, ANSWER]
    assert len(read({"messages": turns, "system": "Be brief."}).turns) == 3
    with pytest.raises(BadItemError, match="a system turn that says another"):
        read({"messages": turns, "system": "Be long."})


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize(("value", "learned"), [(0, False), (False, False), (0.0, False), (1, True), (True, True)])
def test_a_turn_says_whether_it_is_learned(key: str, value: Any, learned: bool) -> None:
    item = read({"messages": [ASK, {**ANSWER, key: value}, ASK, ANSWER]})
    assert [item.learns(index) for index in range(4)] == [False, learned, False, True]
    assert item.messages() == [ASK, ANSWER, ASK, ANSWER], "the template does not see it"


def test_weights_of_prompts_are_read_or_told() -> None:
    assert read({"messages": [{**ASK, "train": False}, ANSWER]}).unread == ()
    assert read({"messages": [{**ASK, "train": True}, ANSWER]}).unread == ("messages[].train",)


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "won?"}]
    assert read({"messages": [{"role": "user", "content": parts}, ANSWER]}).turns[0] == ("user", "Who won?")
    picture = [*parts, {"type": "image_url", "image_url": "x.png"}]
    with pytest.raises(BadItemError, match="turn 0: content has a part of type 'image_url'"):
        read({"messages": [{"role": "user", "content": picture}, ANSWER]})


def test_tools_calls_and_reasoning_reach_the_messages() -> None:
    text_call = {"function": {"name": "find_case", "arguments": '{"year": "1999"}'}}
    for call in (CALL, text_call):
        item = read(
            {
                "tools": [TOOL],
                "messages": [
                    ASK,
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "name": "find_case", "content": "Smith v Jones"},
                    {**ANSWER, "reasoning_content": "I read it."},
                ],
            }
        )
        assert item.tools == (TOOL,)
        assert item.messages()[1:] == [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "Smith v Jones", "name": "find_case"},
            {**ANSWER, "reasoning_content": "I read it."},
        ]
        assert item.learns(1) and item.unread == ()


def test_sharegpt_roles_of_tools() -> None:
    item = read(
        {
            "tools": '[{"type": "function", "function": {"name": "find_case"}}]',
            "conversations": [
                {"from": "human", "value": "Who won?"},
                {"from": "function_call", "value": '{"name": "find_case", "arguments": {"year": "1999"}}'},
                {"from": "observation", "value": "Smith"},
                {"from": "gpt", "value": "Smith."},
            ],
        }
    )
    assert [role for role, _ in item.turns] == ["user", "assistant", "tool", "assistant"]
    assert item.messages()[1]["tool_calls"] == [CALL]
    function = item.tools[0]["function"]
    assert isinstance(function, dict) and function["name"] == "find_case"


BAD: list[tuple[Any, str, str]] = [
    ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "bad weight", "turn 1: weight must be 1 or true"),
    ({"messages": [ASK, {**ANSWER, "loss": "no"}]}, "bad weight", "not 'no'"),
    ({"messages": [ASK, {**ANSWER, "loss": 0, "train": 1}]}, "bad weight", "train and loss contradict"),
    ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "nothing to learn", "no response is left to learn"),
    ({"prompt": "a", "completion": "b", "label": False}, "preference data", "'label' is false"),
    ({"prompt": "a", "completion": "b", "label": "False"}, "preference data", "'label' is false"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data", "keep the chosen answer as 'completion'"),
    ({"text": "All of it."}, "plain text", "cofitune learns responses to prompts"),
    ({"instruction": "a", "output": 0}, "wrong type", "'output' is 0, no text"),
    ({"instruction": "a", "output": False}, "wrong type", "'output' is False, no text"),
    ({"instruction": "a", "input": 0, "output": "b"}, "wrong type", "'input' is 0, no text"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "wrong type", "'history' must be a list of pairs"),
    ({"instruction": "a", "output": "b", "system": 1}, "wrong type", "'system' must be a string"),
    ({"messages": [ASK, ANSWER], "tools": "{"}, "bad tools", "'tools' must be a list"),
    ({"messages": [ASK, {**ANSWER, "tool_calls": [{"x": 1}]}]}, "bad tool call", "a function with a name"),
    ({"messages": [ASK, {**ANSWER, "tool_calls": 3}]}, "bad tool call", "a function with a name"),
    ({"messages": [ASK, {**ANSWER, "reasoning_content": 3}]}, "bad turn", "reasoning_content must be a string"),
    ({"messages": [ASK, {**ANSWER, "content": "cut \ud83d"}]}, "broken character", "turn 1 holds half a character"),
    ('{"instruction": "a", "output": "b", "output": "c"}', "key twice", "the key 'output' stands there twice"),
    ('{"instruction": "a", "output": "\\ud83d"}\n', "broken character", r"\\ud83d at character 1"),
    ("[" * 100_000, "not valid JSON", "nested too deeply"),
    ("{\n", "not valid JSON", "a line holds a whole object .* in a file named .json"),
    ('{"instruction": "a", "output": "b"},\n', "not valid JSON", "a comma stands behind the object"),
    ('{"instruction": "a', "not valid JSON", "Unterminated string starting at column 17"),
    ({"Instruction": "a", "Output": "b"}, "unknown keys", "'Instruction' is read where it is written 'instruction'"),
    ({"instruction": "a", "Output": "b"}, "missing key", "'Output' is read where it is written 'output'"),
    ({"messages": [{**ASK, "role": "User"}, ANSWER]}, "bad turn", "its role is 'User'; write it 'user'"),
    ('{"instruction": ' + "1" * 5000 + "}", "not valid JSON", "not valid JSON"),
]


@pytest.mark.parametrize(("item", "reason", "message"), BAD)
def test_what_cannot_be_learned_is_refused_with_its_reason(item: Any, reason: str, message: str) -> None:
    with pytest.raises(BadItemError, match=message) as refused:
        read(item)
    assert refused.value.reason == reason and str(refused.value).startswith("d.jsonl:1: ")


PAIR = {"prompt": "a", "completion": "b"}
FORMS: list[dict[str, Any]] = [PAIR, {"instruction": "a", "output": "b"}, {"messages": [ASK, ANSWER]}]


@pytest.mark.parametrize("form", FORMS, ids=["prompt", "alpaca", "messages"])
def test_a_label_is_a_verdict_or_unread(form: dict[str, Any]) -> None:
    for unwanted in (False, 0, 0.0, "false", "False", " FALSE ", "0"):
        with pytest.raises(BadItemError, match="'label' is .*: a response that is not wanted") as refused:
            read({**form, "label": unwanted})
        assert refused.value.reason == "preference data"
    for wanted in (True, 1, 1.0, "true", "True", "1"):
        assert read({**form, "label": wanted}).unread == ()
    for of_a_class in ("spam", "neutral", 2, -1, 0.5, "", ["spam"], [], {"id": 0}):
        assert read({**form, "label": of_a_class}).unread == ("label",)


def test_a_null_label_beside_a_completion_is_no_verdict() -> None:
    with pytest.raises(BadItemError, match="'label' is null: nobody says whether the response is wanted"):
        read({**PAIR, "label": None})
    assert read({"instruction": "a", "output": "b", "label": None}).unread == (), "a gap of a table"


def test_a_broken_character_in_a_key_that_nothing_reads_can_be_told() -> None:
    item = parse('{"prompt": "a", "completion": "b", "note\\ud83d": 1}')
    assert read(item).unread == ("note\\ud83d",)
    assert read({"messages": [ASK, {**ANSWER, "\ud83d": 1}]}).unread == ("messages[].\\ud83d",)
    task = EvalTask("t", "gen_kn", "f.jsonl", "generate", "exact_match")
    assert unread_keys({"question": "a", "answer": "b", "\ud83d": 1}, task) == ["\\ud83d"]


def test_keys_that_nothing_reads_are_counted_by_name() -> None:
    account = ItemCounts()
    for extra in ({"id": 1}, {"id": 2, "source": "x", "score": None}, {}):
        account.note_unread(read({"instruction": "a", "output": "b", **extra}).unread)
    assert account.unread == {"id": 2, "source": 1}
    turns = [{**ASK, "id": 1}, {**ANSWER, "id": 2, "name": "x"}]
    assert read({"messages": turns, "instruction": "z"}).unread == (
        "instruction",
        "messages[].id",
        "messages[].name",
    )
    assert ItemCounts.total([account, account]).unread == {"id": 4, "source": 2}


def test_a_prompt_with_tools_is_not_rehearsed() -> None:
    with pytest.raises(BadItemError, match="a prompt with 'tools' cannot be rehearsed"):
        make_prompt("p.jsonl:1", {"messages": [ASK], "tools": [TOOL]}, "auto")


@pytest.mark.parametrize(
    ("line", "column"), [('{"a": 1', 8), ('{"a": 1\n', 8), ('{"a" 1}\n', 6), ('{"a": 1} {}\r\n', 10), ('{"a": x}', 7)]
)
def test_an_error_of_json_names_the_column(line: str, column: int) -> None:
    with pytest.raises(BadItemError, match=rf"at column {column}$"):
        parse(line)


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("role", "content", "names"), [("role", "content", ("user", "assistant")), ("from", "value", ("human", "gpt"))]
)
def test_turns_are_read_under_the_keys_that_they_have(
    key: str, role: str, content: str, names: tuple[str, str]
) -> None:
    user, assistant = names
    turns = [{role: user, content: "Who won?"}, {role: assistant, content: "The buyer."}]
    item = read({key: turns})
    assert item.turns == (("user", "Who won?"), ("assistant", "The buyer.")) and item.unread == ()


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "narrator", "content": "x"}, r"turn 1 needs a role .*; its role is 'narrator'"),
        ({"role": "assistant", "content": 4}, r"turn 1 needs .* a content that is a string; its content is 4"),
        (
            {"role": "assistant", "content": "x", "tool_calls": "find_case(1999)"},
            "tool_calls is a text that is no JSON",
        ),
        ({"role": "assistant", "content": "x", "tool_calls": "3"}, "a tool call needs a function with a name"),
    ],
)
def test_what_a_turn_says_wrongly_is_shown(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(BadItemError, match=message):
        read({"messages": [ASK, turn]})


def test_keys_of_text_parts_that_nothing_reads_are_told() -> None:
    part = {"type": "text", "text": "Who won?", "cache_control": {"type": "ephemeral"}, "image_url": None}
    item = read({"messages": [{"role": "user", "content": [part, {"type": "text", "text": " Say."}]}, ANSWER]})
    assert item.turns[0] == ("user", "Who won? Say.") and item.unread == ("messages[].content[].cache_control",)
