"""A file of JSON lines survives a kill at any byte, and says where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cofitune.errors import ArtifactError
from cofitune.jsonl import append_line, json_object, read_lines

LINES = [{"step": 1, "text": "größer\u2028"}, {"step": 2, "text": ""}, {"step": 3, "text": "x" * 300}]


def _write(path: Path) -> bytes:
    for line in LINES:
        append_line(path, json.dumps(line, ensure_ascii=False))
    return path.read_bytes()


def test_lines_read_back_as_they_were_appended(tmp_path: Path) -> None:
    content = _write(tmp_path / "a.jsonl")
    assert content.count(b"\n") == 3 and content.endswith(b"\n")
    assert read_lines(tmp_path / "a.jsonl", json_object, may_be_torn=True) == LINES


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    content = _write(tmp_path / "a.jsonl")
    path = tmp_path / "cut.jsonl"
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        whole = LINES[: content[:cut].count(b"\n")]
        assert read_lines(path, json_object, may_be_torn=True) == whole
        append_line(path, '{"step": 9}')
        assert read_lines(path, json_object, may_be_torn=False) == [*whole, {"step": 9}]


def test_a_last_line_without_line_break_counts_where_no_kill_cuts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}')
    assert read_lines(tmp_path / "a.jsonl", json_object, may_be_torn=False) == [{"a": 1}, {"a": 2}]
    assert read_lines(tmp_path / "none.jsonl", json_object, may_be_torn=False) == []


@pytest.mark.parametrize("damaged", ["{", "[1]", "", "\udc80"])
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'{{"a": 1}}\n{damaged}\n{{"a": 2}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match=r"a.jsonl:2: this row is damaged: "):
        read_lines(path, json_object, may_be_torn=True, what="row")
