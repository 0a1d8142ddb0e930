"""Files that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from cofitune.errors import ArtifactError, UserError, WriteError
from cofitune.files import (
    check_unlocked,
    exclusive,
    one_at_a_time,
    read_json,
    read_tensors,
    remove_free_lock,
    sha256_file,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)  # fmt: skip
from cofitune.jsonl import append_line
from tests.helpers import at_most_bytes


def test_a_file_is_written_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    write_text(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "x.txt", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == mode


def test_a_full_disk_is_one_message_and_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", "old\n")
    with at_most_bytes(1000):
        for write in (
            lambda: write_text(tmp_path / "x.txt", "new" * 1000),
            lambda: write_tensors(tmp_path / "x.txt", {"a": torch.zeros(1000)}),
            lambda: append_line(tmp_path / "x.txt", "new" * 1000),
        ):
            with pytest.raises(WriteError, match=r"x\.txt: cannot be written: .*[Ff]ile too large"):
                write()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"] and (tmp_path / "x.txt").read_text().startswith("old\n")


def test_a_line_for_a_folder_that_was_deleted_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="its folder is gone"):
        append_line(tmp_path / "run" / "metrics.jsonl", "{}")


def test_a_lock_is_seen_before_it_is_taken_and_gone_afterwards(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=f"another training is writing here .process {os.getpid()}")
    with exclusive(tmp_path / "train", "training"), refused:
        check_unlocked(tmp_path / "train", "training")
    check_unlocked(tmp_path / "train", "training")
    assert not any(tmp_path.iterdir())


def test_a_lock_leaves_no_empty_folder_after_a_mistake(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run" / "train"
    with pytest.raises(ValueError, match="found late"), exclusive(folder, "training"):
        raise ValueError("found late")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with exclusive(tmp_path / "kept" / "train", "training"):
        pass
    with exclusive(folder, "training"):
        folder.mkdir()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "kept", "run", "train"], "what was there, or is used"


def test_a_lock_goes_with_the_last_child_that_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    with exclusive(folder, "search"):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        remove_free_lock(folder)
        with pytest.raises(UserError, match="another search is writing here"):
            check_unlocked(folder, "search")
    finally:
        child.kill()
        child.wait()
    remove_free_lock(folder)
    assert not list(tmp_path.iterdir())


def test_who_waits_for_a_lock_gets_it_and_the_last_takes_its_file_away(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "x.lock", [0], [0]

    def work() -> None:
        with one_at_a_time(path):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not path.exists()


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_raises_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, old: str | None, error: type[BaseException]
) -> None:
    path = tmp_path / "x.txt"
    if old is not None:
        path.write_text(old)

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["x.txt"])
    assert old is None or path.read_text() == old


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old"] and path.read_text() == "new"


def test_a_value_that_json_does_not_know_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path, "thing") == {"a": 1}


def test_json_keeps_its_order_and_letters(tmp_path: Path) -> None:
    value = {"z": [1, 2.5, None, True], "a": "ü"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json", "thing") == value
    assert text.index('"z"') < text.index('"a"') and "ü" in text and text.endswith("}\n")
    assert text == json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.json: this thing is damaged"):
        read_json(tmp_path / "x.json", "thing")
    with pytest.raises(ArtifactError, match=r"y\.json: no thing here"):
        read_json(tmp_path / "y.json", "thing")


def test_tensors_survive_with_their_metadata(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b": torch.zeros(0)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"made_by": "test"})
    read = read_tensors(path, "delta")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "test"}


def test_truncated_or_missing_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"x\.safetensors: this delta is damaged"):
            read_tensors(path, "delta")
    with pytest.raises(ArtifactError, match="no delta here"):
        read_tensors(tmp_path / "y.safetensors", "delta")


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
