"""Reading items: both formats, and every unusable item with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofitune.data.read import Account, Item, bad_item, read_items, read_jsonl, user_text
from cofitune.errors import DataError

GOOD = {"instruction": "Say hi.", "input": "", "output": "Hi!"}
CHAT = {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]}


def write(path: Path, *lines: Any) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_both_formats_become_the_same_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, CHAT)
    items, account = read_items([(path, "auto")])
    assert [item.turns for item in items] == [(("user", "Say hi."), ("assistant", "Hi!"))] * 2
    assert items[0].messages() == CHAT["messages"]
    assert (account.read, account.dropped) == (2, [])


def test_items_keep_the_order_of_the_sources_and_their_place(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", GOOD, "", "   ", {**GOOD, "output": "second"})
    second = write(tmp_path / "b.jsonl", CHAT)
    items, account = read_items([(second, "messages"), (first, "alpaca")])
    assert [item.where for item in items] == [f"{second}:1", f"{first}:1", f"{first}:4"]
    assert account.read == 3, "empty lines are no items"


@pytest.mark.parametrize(
    ("instruction", "given", "text"),
    [("Do.", "", "Do."), (" Do. ", " this\n", "Do.\nthis"), ("", "this", "this"), ("Do.", "a\n\nb", "Do.\na\n\nb")],
)
def test_the_input_stands_below_the_instruction(instruction: str, given: str, text: str) -> None:
    assert user_text(instruction, given) == text


def test_the_response_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "x", "output": "  indented\n"}, {**GOOD, "input": None})
    items, _ = read_items([(path, "auto")])
    assert items[0].turns[-1] == ("assistant", "  indented\n")
    assert items[1].turns[0] == ("user", "Say hi.")


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD = [
    ("{", "not valid JSON"),
    ("[1]", "a JSON object, not list"),
    ('"text"', "a JSON object, not str"),
    ({"text": "x"}, "this one has ['text']"),
    ({"instruction": "x"}, "no 'output'"),
    ({**GOOD, "output": ""}, "the response ('output') is empty"),
    ({**GOOD, "output": " \n"}, "the response ('output') is empty"),
    ({**GOOD, "output": None}, "the response ('output') is empty"),
    ({**GOOD, "output": 4}, "must be strings"),
    ({**GOOD, "instruction": "", "input": " "}, "both empty"),
    ({"messages": []}, "must be a list of turns"),
    ({"messages": "hi"}, "must be a list of turns"),
    ({"messages": ["hi"]}, "turn 0 needs a role"),
    (turns(("user", "a"), ("bot", "b")), "turn 1 needs a role (system, user, assistant)"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "a content that is a string"),
    (turns(("user", "a"), ("assistant", " ")), "the response in turn 1 is empty"),
    (turns(("user", "a")), "the last turn is the user's"),
    (turns(("assistant", "a")), "it must be the user's"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_an_unusable_item_is_named_by_file_and_line(tmp_path: Path, bad: Any, said: str) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, bad, GOOD)
    with pytest.raises(DataError) as caught:
        read_items([(path, "auto")])
    assert str(caught.value).startswith(f"{path}:2: ") and said in str(caught.value)
    assert "data.on_bad_item: drop" in str(caught.value)


def test_dropping_counts_every_unusable_item_and_keeps_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[bad for bad, _ in BAD], GOOD)
    items, account = read_items([(path, "auto")], on_bad_item="drop")
    assert [item.where for item in items] == [f"{path}:{len(BAD) + 1}"]
    assert account.read == len(BAD) + 1
    assert [reason.startswith(f"{path}:{n}: ") for n, reason in enumerate(account.dropped, 1)] == [True] * len(BAD)


def test_a_format_that_was_named_is_not_guessed_around(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(DataError, match="'messages' must be a list"):
        read_items([(path, "messages")])
    path = write(tmp_path / "d.jsonl", CHAT)
    with pytest.raises(DataError, match="no 'instruction'"):
        read_items([(path, "alpaca")])


def test_missing_empty_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such data file"):
        read_items([(str(tmp_path / "none.jsonl"), "auto")])
    with pytest.raises(DataError, match="holds no items"):
        read_items([(write(tmp_path / "e.jsonl", "", " "), "auto")])
    (tmp_path / "b.jsonl").write_bytes(b'{"instruction": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="cannot be read"):
        read_items([(str(tmp_path / "b.jsonl"), "auto")])
    with pytest.raises(DataError, match="cannot be read"):
        read_items([(str(tmp_path), "auto")])


def test_one_empty_file_among_full_ones_is_still_refused(tmp_path: Path) -> None:
    full, empty = write(tmp_path / "f.jsonl", GOOD), write(tmp_path / "e.jsonl", "")
    with pytest.raises(DataError, match=r"e\.jsonl: holds no items"):
        read_items([(full, "auto"), (empty, "auto")])


def test_a_line_separator_of_unicode_does_not_split_an_item(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**GOOD, "output": "a\u2028b\x85c"}, CHAT)
    items, _ = read_items([(path, "auto")])
    assert items[0].turns[-1][1] == "a\u2028b\x85c"
    assert items[1].where.endswith(":2")


def test_windows_line_ends_and_a_missing_last_one(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\r\n" + json.dumps(CHAT).encode())
    assert len(read_items([(str(path), "auto")])[0]) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_item(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert len(read_items([(str(path), "auto")])[0]) == 1


def test_read_jsonl_yields_numbered_objects_and_names_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"a": 1}, "", {"a": 2}, "{")
    found = read_jsonl(path)
    assert [next(found), next(found)] == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(DataError, match=r"d\.jsonl:4: this line is not valid JSON"):
        next(found)


def test_bad_item_stops_or_counts() -> None:
    account = Account()
    bad_item("f:1: why", "drop", account)
    assert account.dropped == ["f:1: why"]
    with pytest.raises(DataError, match="f:2: why"):
        bad_item("f:2: why", "error", account)
    assert Item((("user", "a"),), "f:1").messages() == [{"role": "user", "content": "a"}]
