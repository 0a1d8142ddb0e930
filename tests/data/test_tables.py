"""Tables and arrays as people save them: an index, ragged rows, names twice, gzip, pictures nobody asks for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, lines, make_item, read_jsonl
from cofitune.data.sources import Source, open_source
from cofitune.errors import DataError

GOOD = {"instruction": "Say hi.", "output": "Hi!"}


def items_of(path: Path) -> list[Item | str]:
    """Each row as an item, or the message that refuses it."""
    results: list[Item | str] = []
    for where, row in open_source(Source(str(path))).rows():
        try:
            results.append(make_item(where, row, "auto"))
        except BadItemError as error:
            results.append(str(error))
    return results


def test_a_data_frames_index_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    path.write_text(',instruction,output\n0,Say A,A it is.\n1,Say B,"B\nit ""is"""\n')
    one, two = items_of(path)
    assert isinstance(one, Item) and one.turns == (("user", "Say A"), ("assistant", "A it is."))
    assert isinstance(two, Item) and two.turns[1][1] == 'B\nit "is"'
    assert one.unread == ("column 1 (no name)",)


def test_a_row_with_too_many_fields_is_one_bad_item(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('instruction,output\nSay hi.,Hi!\nSay a, b.,AB\n"Say" c,C\n\nSay d.\nSay e.,E\n')
    one, two, three, four, five = items_of(path)
    assert isinstance(one, Item) and isinstance(five, Item)
    assert two == f"{path}: row 2: the row has 3 fields and the header 2; a text with a comma stands in quotes"
    assert isinstance(three, str) and "row 3: line 4 is not valid CSV" in three
    assert isinstance(four, str) and "row 4: the item has no 'output'" in four


@pytest.mark.parametrize("name", ["d.csv", "d.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "d.csv":
        path.write_text("instruction,output,output\na,b,c\n")
    else:
        columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
        pq.write_table(pa.Table.from_arrays(columns, ["instruction", "output", "output"]), path)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: two columns are called 'output'"):
        items_of(path)


def test_a_long_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(f"instruction,output\nx,{'y' * 200_000}\n")
    (item,) = items_of(path)
    assert isinstance(item, Item) and len(item.turns[1][1]) == 200_000


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.gz", "d.csv.gz", "D.JSONL.GZ"])
def test_files_in_gzip_are_read_alone_and_in_folders(tmp_path: Path, name: str) -> None:
    text = {"json": json.dumps([GOOD]), "csv": "instruction,output\nSay hi.,Hi!\n", "jsonl": json.dumps(GOOD)}
    path = tmp_path / name
    path.write_bytes(gzip.compress(text[name.lower().split(".")[1]].encode()))
    for place in (path, tmp_path):
        (item,) = items_of(place)
        assert isinstance(item, Item) and item.turns[1][1] == "Hi!"


CUT_GZIP = gzip.compress(json.dumps(GOOD).encode() * 50, mtime=0)[:40]


@pytest.mark.parametrize("content", [b"no gzip at all", CUT_GZIP], ids=["other", "cut"])
def test_a_damaged_gzip_file_is_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: cannot be read"):
        items_of(path)


def test_a_broken_picture_in_a_column_that_is_not_read(tmp_path: Path) -> None:
    import datasets

    rows = {"instruction": ["Say hi."], "output": ["Hi!"], "picture": [{"bytes": b"no picture", "path": None}]}
    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.Value("string"), "picture": datasets.Image()}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "d.parquet"))
    (item,) = items_of(tmp_path / "d.parquet")
    assert isinstance(item, Item) and item.unread == ("picture",)


def test_gaps_of_objects_in_a_parquet_file_are_no_values(tmp_path: Path) -> None:
    call = {"function": {"name": "find_case", "arguments": '{"year": null}'}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Who won?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "d.parquet")
    (item,) = items_of(tmp_path / "d.parquet")
    assert isinstance(item, Item)
    assert item.messages()[0] == turns[0], "the user's turn has no tool_calls"
    assert item.messages()[1]["tool_calls"][0]["function"]["arguments"] == {"year": None}


def test_an_array_of_json_refuses_one_item_and_reads_the_others(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(f' [\n{json.dumps(GOOD)},\n{{"instruction": "a", "instruction": "b"}} , {json.dumps(GOOD)}\n]\n')
    one, two, three = items_of(path)
    assert isinstance(one, Item) and isinstance(three, Item)
    assert two == f"{path}: item 2: the key 'instruction' stands there twice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n{"a": 2}]', r"d\.json:2: cannot be read: Expecting ',' delimiter at column 1 \(item 2\)"),
        ('[{"a": 1},\n {"a" 2}]', r"d\.json:2: .* at column 7 \(item 2\)"),
        ('[{"a": 1}', r"d\.json:1: .* at column 10 \(item 2\)"),
        ('[{"a": 1}] x', r"d\.json:1: cannot be read: Extra data at column 12"),
        ("[" + "[" * 100_000, r"d\.json: cannot be read: nested too deeply"),
    ],
)
def test_a_broken_array_is_named_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError, match=message):
        items_of(tmp_path / "d.json")


def test_text_of_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + '{"instruction": "ä"}'.encode("latin-1"))
    with pytest.raises(DataError, match="can't decode.*save it as UTF-8"):
        list(read_jsonl(path))


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        open_source(Source(str(tmp_path / "d.jsonl")))
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        next(lines(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match="is no file|holds no data files"):
        open_source(Source(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolon.csv", b"instruction;output\nSay hi.;Hi, you!\n"),
        ("bom.csv", b"\xef\xbb\xbfinstruction;output\r\nSay hi.;Hi, you!\r\n"),
        ("tab.csv", b"instruction\toutput\nSay hi.\tHi, you!\n"),
        ("tab.tsv", b"instruction\toutput\nSay hi.\tHi, you!\n"),
        ("zipped.tsv.gz", gzip.compress(b"instruction\toutput\nSay hi.\tHi, you!\n", mtime=0)),
        ("space.csv", b'instruction, output\nSay hi.,"Hi, you!"\n'),
        ("quoted.csv", b'"instruction","output"\n"Say hi.","Hi, you!"\n'),
    ],
)
def test_a_header_without_a_comma_says_what_parts_the_fields(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (item,) = items_of(tmp_path / name)
    assert isinstance(item, Item) and item.turns == (("user", "Say hi."), ("assistant", "Hi, you!"))
    assert not item.unread


def test_the_header_of_a_tsv_file_may_hold_a_comma(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("instruction\toutput\tnotes, if any\nSay hi.\tHi, you!\tgood\n")
    (item,) = items_of(tmp_path / "d.tsv")
    assert isinstance(item, Item) and item.turns == (("user", "Say hi."), ("assistant", "Hi, you!"))
    assert item.unread == ("notes, if any",)


def test_a_column_of_texts_may_hold_the_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]
    pq.write_table(pa.table({"messages": [json.dumps(turns), "[", '"a"']}), tmp_path / "d.parquet")
    one, *bad = items_of(tmp_path / "d.parquet")
    assert isinstance(one, Item) and one.turns == (("user", "Say hi."), ("assistant", "Hi!"))
    assert all(isinstance(text, str) and "'messages' must be a list of turns" in text for text in bad)
