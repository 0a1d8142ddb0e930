"""Reading items: every format, and every unusable item with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofitune.data.formats import BadItemError, user_text
from cofitune.data.read import Item, ItemCounts, bad_item, make_item, read_jsonl
from cofitune.data.sources import Source, open_source
from cofitune.errors import DataError

GOOD = {"instruction": "Say hi.", "input": "", "output": "Hi!"}
CHAT = {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]}


def write(path: Path, *lines: Any) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(path: str, form: str = "auto", on_bad_item: str = "error") -> tuple[list[Item], ItemCounts]:
    """Every usable item of a source, and the account."""
    items, account = [], ItemCounts()
    for where, row in open_source(Source(path, form)).rows():
        account.read += 1
        try:
            items.append(make_item(where, row, form))
        except BadItemError as error:
            bad_item(error, on_bad_item, account)
    return items, account


SHAREGPT = {"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi!"}]}
STRINGS = {"prompt": "Say hi.", "completion": "Hi!"}
LISTS = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}


def test_every_format_becomes_the_same_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, CHAT, SHAREGPT, STRINGS, LISTS)
    items, account = read(path)
    assert [item.turns for item in items] == [(("user", "Say hi."), ("assistant", "Hi!"))] * 5
    assert [item.context for item in items] == [0, 0, 0, 0, 1]
    assert items[0].messages() == CHAT["messages"]
    assert (account.read, account.dropped) == (5, 0)


def test_a_prompt_of_messages_is_context_with_all_its_responses(tmp_path: Path) -> None:
    asked = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = [{"role": role, "content": content} for role, content in asked]
    path = write(tmp_path / "d.jsonl", {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    (item,), _ = read(path)
    assert item.turns == (*asked, ("assistant", "d")) and item.context == 4


def test_sharegpt_turns_take_the_roles_that_templates_know(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    path = write(tmp_path / "d.jsonl", {"conversations": [{"from": role, "value": text} for role, text in turns]})
    (item,), _ = read(path)
    assert [role for role, _ in item.turns] == ["system", "user", "assistant", "user", "assistant"]


def test_a_null_key_counts_as_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**GOOD, "messages": None}, {**CHAT, "instruction": None, "input": None})
    items, _ = read(path)
    assert items[0].turns == items[1].turns


def test_items_keep_their_order_and_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "", "   ", {**GOOD, "output": "second"})
    items, account = read(path, "alpaca")
    assert [item.where for item in items] == [f"{path}:1", f"{path}:4"]
    assert account.read == 2, "empty lines are no items"


@pytest.mark.parametrize(
    ("instruction", "given", "text"),
    [("Do.", "", "Do."), (" Do. ", " this\n", "Do.\nthis"), ("", "this", "this"), ("Do.", "a\n\nb", "Do.\na\n\nb")],
)
def test_the_input_stands_below_the_instruction(instruction: str, given: str, text: str) -> None:
    assert user_text(instruction, given) == text


def test_the_response_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "x", "output": "  indented\n"}, {**GOOD, "input": None})
    items, _ = read(path)
    assert items[0].turns[-1] == ("assistant", "  indented\n")
    assert items[1].turns[0] == ("user", "Say hi.")


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD = [
    ("{", "not valid JSON"),
    ("[1]", "a JSON object, not list"),
    ('"text"', "a JSON object, not str"),
    ({"txt": "x"}, "this one has ['txt']"),
    ({"text": "x"}, "this is plain text ('text'), and cofitune learns responses to prompts"),
    ({"prompt": "x"}, "no 'completion'"),
    ({"prompt": " ", "completion": "x"}, "the prompt is empty"),
    ({"prompt": "x", "completion": "\n"}, "the response ('completion') is empty"),
    ({"prompt": "x", "completion": []}, "both be strings, or both lists"),
    ({"prompt": CHAT["messages"][:1], "completion": []}, "'completion' must be a list of turns"),
    ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][:1]}, "the last turn is the user's"),
    ({"conversations": {}}, "'conversations' must be a list of turns with a from and a value"),
    ({"conversations": [{"from": "bing", "value": "x"}]}, "turn 0 needs a from (system, human, user, gpt, "),
    ({"conversations": [{"from": "human", "value": "x"}]}, "the last turn is the user's"),
    ({"instruction": "x"}, "no 'output'"),
    ({**GOOD, "output": ""}, "the response ('output') is empty"),
    ({**GOOD, "output": " \n"}, "the response ('output') is empty"),
    ({**GOOD, "output": None}, "no 'output'"),
    ({**GOOD, "output": 4}, "must be strings"),
    ({**GOOD, "instruction": "", "input": " "}, "both empty"),
    ({"messages": []}, "must be a list of turns"),
    ({"messages": "hi"}, "must be a list of turns"),
    ({"messages": ["hi"]}, "turn 0 needs a role"),
    (turns(("user", "a"), ("bot", "b")), "turn 1 needs a role (system, user, assistant, tool, function)"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "a content that is a string"),
    (turns(("user", "a"), ("assistant", " ")), "the response in turn 1 is empty"),
    (turns(("user", "a")), "the last turn is the user's"),
    (turns(("assistant", "a")), "it must be the user's"),
]


@pytest.mark.parametrize(("bad", "output"), BAD)
def test_an_unusable_item_is_named_by_file_and_line(tmp_path: Path, bad: Any, output: str) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, bad, GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ") and output in str(caught.value)
    assert "data.on_bad_item: drop" in str(caught.value)


def test_dropping_counts_every_unusable_item_and_keeps_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[bad for bad, _ in BAD], GOOD)
    items, account = read(path, on_bad_item="drop")
    assert [item.where for item in items] == [f"{path}:{len(BAD) + 1}"]
    assert account.read == len(BAD) + 1 and account.dropped == len(BAD)
    assert account.reasons["not valid JSON"] == 1 and account.reasons["not a JSON object"] == 2
    assert [message.split(": ")[0] for message in account.first_dropped] == [f"{path}:{n}" for n in range(1, 6)]


def test_accounts_add_up_in_order() -> None:
    one = ItemCounts(3, 1, 1, 10, 5, {"a": 1, "b": 1}, ["f:1", "f:2"])
    two = ItemCounts(7, 2, 0, 20, 9, {"b": 5}, [f"g:{n}" for n in range(5)])
    assert ItemCounts.total([one, two]) == ItemCounts(
        10, 3, 1, 30, 14, {"a": 1, "b": 6}, ["f:1", "f:2", "g:0", "g:1", "g:2"]
    )
    assert one.first_dropped == ["f:1", "f:2"], "what was added up stays as it was"


def test_a_format_that_was_named_is_not_guessed_around(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(DataError, match="'messages' must be a list"):
        read(path, "messages")
    path = write(tmp_path / "d.jsonl", CHAT)
    with pytest.raises(DataError, match="no 'instruction'"):
        read(path, "alpaca")


def test_missing_empty_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such data file"):
        read(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="holds no items"):
        read(write(tmp_path / "e.jsonl", "", " "))
    (tmp_path / "b.jsonl").write_bytes(b'{"instruction": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="cannot be read"):
        read(str(tmp_path / "b.jsonl"))


def test_a_line_separator_of_unicode_does_not_split_an_item(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**GOOD, "output": "a\u2028b\x85c"}, CHAT)
    items, _ = read(path)
    assert items[0].turns[-1][1] == "a\u2028b\x85c"
    assert items[1].where.endswith(":2")


def test_windows_line_ends_and_a_missing_last_one(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\r\n" + json.dumps(CHAT).encode())
    assert len(read(str(path))[0]) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_item(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert len(read(str(path))[0]) == 1


def test_read_jsonl_yields_numbered_objects_and_names_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"a": 1}, "", {"a": 2}, "{")
    result = read_jsonl(path)
    assert [next(result), next(result)] == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(DataError, match=r"d\.jsonl:4: this line is not valid JSON"):
        next(result)


def test_bad_item_stops_or_counts() -> None:
    account = ItemCounts()
    bad_item(BadItemError("a kind", "f:1: why"), "drop", account)
    assert account.reasons == {"a kind": 1} and account.first_dropped == ["f:1: why"]
    with pytest.raises(DataError, match="f:2: why"):
        bad_item(BadItemError("a kind", "f:2: why"), "error", account)
    assert Item((("user", "a"),), "f:1").messages() == [{"role": "user", "content": "a"}]
