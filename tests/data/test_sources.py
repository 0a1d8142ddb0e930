"""Sources: every kind of file gives the same items with its own places; what cannot be found is said in one message."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cofitune.data.read import make_item
from cofitune.data.sources import OpenSource, Source, open_source
from cofitune.errors import DataError

ROWS = [{"prompt": f"say {n}", "completion": text} for n, text in enumerate(("NA", "4", "", "null", 'a,\n"b"'))]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path, **fields: Any) -> list[tuple[str, Any]]:
    results = [
        (where, json.loads(r) if isinstance(r, str) else r)
        for where, r in open_source(Source(str(path), **fields)).rows()
    ]
    return [(where.removeprefix(str(path)), row) for where, row in results]


@pytest.mark.parametrize(
    ("suffix", "place"), [("jsonl", ":{}"), ("json", ": item {}"), ("csv", ": row {}"), ("parquet", ": row {}")]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str, place: str) -> None:
    path = write(tmp_path / f"d.{suffix}")
    assert rows_of(path) == [(place.format(n), row) for n, row in enumerate(ROWS, start=1)]


def test_json_lines_in_a_json_file_and_turns_in_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_of(path) == [(f":{n}", row) for n, row in enumerate(ROWS, start=1)]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    gaps = {"messages": turns, "prompt": None, "completion": None}
    path = write(tmp_path / "d.parquet", [gaps, {"messages": None, "prompt": "a", "completion": "b"}])
    items = [make_item(where, row, "auto") for where, row in open_source(Source(str(path))).rows()]
    assert items[0].turns == items[1].turns, "a column that a row lacks is null there"


def test_values_of_other_types_are_refused_and_not_made_text(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [ROWS[0], {"prompt": 1, "completion": ["x"]}])
    *_, (where, row) = open_source(Source(str(path))).rows()
    with pytest.raises(DataError, match=r"d\.json: item 2: prompt and completion must both be strings"):
        make_item(where, row, "auto")


def test_a_parquet_file_is_streamed(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": "a", "completion": str(n)} for n in range(5000)])
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=1000)
    rows = open_source(Source(str(tmp_path / "d.parquet"))).rows()
    assert next(rows)[1] == {"prompt": "a", "completion": "0"}
    assert sum(1 for _ in rows) == 4999


def test_a_folder_is_read_by_split_in_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "[law] data*"  # glob characters are names like any other
    for name in ("train-2.jsonl", "train-1.csv", "test.jsonl", "README.md"):
        write(folder / name, ROWS[:2])
    assert [where for where, _ in rows_of(folder)] == [
        "/train-1.csv: row 1", "/train-1.csv: row 2", "/train-2.jsonl:1", "/train-2.jsonl:2",
    ]  # fmt: skip
    assert [where for where, _ in rows_of(folder, split="test")] == ["/test.jsonl:1", "/test.jsonl:2"]
    with pytest.raises(DataError, match=r"no file of split 'dev' here \(by their names, there are: train, test\)"):
        open_source(Source(str(folder), split="dev"))


def test_a_folder_without_splits_is_all_training_data(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet"):
        write(tmp_path / "d" / name, ROWS[:1])
    assert [where for where, _ in rows_of(tmp_path / "d")] == ["/a.parquet: row 1", "/b.jsonl:1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"this folder holds no data files \(\.jsonl"):
        open_source(Source(str(tmp_path / "empty")))


def test_contents_are_named_by_their_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a" / "x.jsonl"), write(tmp_path / "b" / "y.jsonl")
    assert open_source(Source(str(one))).sha256 == open_source(Source(str(two))).sha256
    before = open_source(Source(str(one.parent))).sha256
    assert before != open_source(Source(str(two.parent))).sha256, "another name, another order"
    write(one, ROWS[:1])
    assert open_source(Source(str(one.parent))).sha256 != before


BROKEN = [
    ("d.parquet", b"nonsense", "d.parquet: cannot be read: Parquet magic bytes not found"),
    (
        "d.json",
        b'[{"prompt": 1,',
        "d.json:1: cannot be read: Expecting property name enclosed in double quotes at column 15 (item 1)",
    ),
    ("d.json", b"[]", "d.json: holds no items"),
    ("d.json", b"", "d.json: holds no items"),
    ("d.csv", b"", "d.csv: holds no items"),
    ("d.csv", b"prompt,completion\n", "d.csv: holds no items"),
    (
        "d.csv",
        b'prompt,completion\na,b\n"x',
        "d.csv: cannot be read: a quoted field is never closed (line 3 is the last)",
    ),
    ("d.csv", b"prompt,completion\na,\xff\n", "invalid start byte; save it as UTF-8"),
    ("d.csv", b"prompt\xff,completion\na,b\n", "d.csv: cannot be read: 'utf-8' codec can't decode"),
]


@pytest.mark.parametrize(("name", "content", "output"), BROKEN)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, output: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(open_source(Source(str(tmp_path / name))).rows())
    assert output in str(caught.value)


@pytest.mark.parametrize("path", ["law.jsonl", "data/law.jsonl", "data/law/train", "/data/law", "./data", "data/x.csv"])
def test_a_path_that_does_not_exist_is_no_hub_name(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match=r"no such data file \(paths are relative to "):
        open_source(Source(path))


def test_without_a_network_a_hub_name_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"org/name: no such file or folder here .* cannot be reached; .*hf down"):
        open_source(Source("org/name"))
    known = open_source(Source("org/name", revision="0" * 40))
    assert known.revision == "0" * 40, "a whole commit needs nobody to say which one it is"
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name" / "a.jsonl")
    assert open_source(Source("org/name")).files == (Path("org/name/a.jsonl"),), "what exists here is meant"


def test_rows_of_a_subset_and_split_are_read_as_from_the_hub(tmp_path: Path) -> None:
    """A folder with the hub's own metadata stands in for the hub, which no test can reach."""
    write(tmp_path / "en" / "test.jsonl", ROWS[:2])
    write(tmp_path / "de" / "test.jsonl", ROWS[2:])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n" for name in ("en", "de")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    result = OpenSource(Source(str(tmp_path), split="test", subset="en"), (), "sha", "commit")
    assert list(result.rows()) == [(f"{tmp_path}: row {n}", row) for n, row in enumerate(ROWS[:2], start=1)]
    assert result.identity() == {"path": str(tmp_path), "sha256": "sha", "revision": "commit"}
    for wrong in (Source(str(tmp_path), split="train", subset="en"), Source(str(tmp_path), split="test", subset="fr")):
        with pytest.raises(DataError, match="cannot be read"):
            list(OpenSource(wrong, (), "sha", "commit").rows())


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"subset": "x"}, "subset is for data sets on the hub"),
        ({"revision": "x"}, "revision is for data sets on the hub"),
        ({"split": "test"}, "split is for folders and data sets on the hub"),
    ],
)
def test_what_a_file_has_not_is_refused(tmp_path: Path, fields: dict[str, Any], output: str) -> None:
    path = write(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=output):
        open_source(Source(str(path), **fields))
