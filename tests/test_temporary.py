"""What a killed process left is taken away by the next one, and what a living one holds stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cofitune.files import write_atomically
from cofitune.temporary import (
    HELD,
    TEMPORARY,
    built_folder,
    open_held,
    put_in_place,
    remove_leftovers,
    temporary_folder,
)

OWNER = """
import sys, time
from pathlib import Path
from cofitune.temporary import temporary_folder
with temporary_folder("cofitune-ranks-", Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    left, foreign = tmp_path / "a" / ".x.0123abcd.cofitune.tmp", tmp_path / ".notes.tmp"
    left.parent.mkdir()
    left.touch()
    foreign.touch()

    def write(temporary: Path) -> None:
        temporary.write_text("mine")
        remove_leftovers(tmp_path)

    write_atomically(tmp_path / "x.txt", write)
    assert (tmp_path / "x.txt").read_text() == "mine" and not left.exists() and foreign.exists()


def test_a_file_is_held_though_a_cleaner_comes_before_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, seen = fcntl.flock, list[Path]()

    def lock_after_a_cleaner(file: Any, how: int) -> None:
        if not seen:  # between the file's making and its lock
            seen.extend(tmp_path.iterdir())
            remove_leftovers(tmp_path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_after_a_cleaner)
    temporary, file = open_held(tmp_path / "prefix")
    with file:
        assert len(seen) == 1 and not seen[0].exists(), "the cleaner took it for a leftover"
        remove_leftovers(tmp_path)
        assert temporary.exists() and TEMPORARY.fullmatch(temporary.name) and temporary != seen[0]
        file.write(b"kept")
    assert temporary.read_bytes() == b"kept"
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir()), "nobody holds it any more"


def test_a_folder_of_a_killed_process_goes_and_all_others_stay(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        (left / "errors").mkdir()
        others = [tmp_path / "cofitune-ranks-being-made", tmp_path / "else"]
        for other in others:
            other.mkdir()
        (others[1] / HELD).touch()
        with temporary_folder("cofitune-ranks-", tmp_path) as own:
            assert left.is_dir() and own.is_dir(), "its owner lives"
        owner.kill()
        owner.wait()
        with temporary_folder("cofitune-ranks-", tmp_path) as own:
            assert not left.exists() and all(other.is_dir() for other in others)
        assert not own.exists()
    finally:
        owner.kill()
        owner.communicate()


def test_a_helper_ends_with_the_process_that_forked_it() -> None:
    program = (
        "import os, time\n"
        "from cofitune.orphan import end_with_parent\n"
        "parent = os.getpid()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    end_with_parent(parent)\n"
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert parent.stdout.read() == "", "the pipe is closed when its last holder, the child, has ended"
    parent.stdout.close()
    assert child != parent.pid


BUILDER_PROCESS = """
import os, signal, sys
from pathlib import Path
from cofitune.files import exclusive
from cofitune.temporary import built_folder
target = Path(sys.argv[1])
with exclusive(target, "export"), built_folder(target) as folder:
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_half_built_folder_of_a_killed_process_goes_with_its_lock(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", BUILDER_PROCESS, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -signal.SIGKILL
    left, foreign = tmp_path / ".killed.building", tmp_path / ".foreign.building"
    assert (left / "model.safetensors").exists() and (tmp_path / ".killed.lock").exists()
    foreign.mkdir()
    (tmp_path / ".foreign.lock").touch()
    with built_folder(tmp_path / "new") as building:
        remove_leftovers(tmp_path, below=False)
        assert building.is_dir() and foreign.is_dir() and not left.exists()
        (building / "config.json").touch()
        put_in_place(building, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"new", ".foreign.building", ".foreign.lock"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]
