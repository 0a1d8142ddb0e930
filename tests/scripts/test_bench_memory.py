"""The memory bench measures what it says: generated files repeat, children are found, and an allocation shows."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "memory.py"
MEBIBYTE = 2**20


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # the scripts there share a module
    spec = importlib.util.spec_from_file_location("bench_memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_memory", module)
    spec.loader.exec_module(module)
    return module


def test_the_same_size_gives_the_same_file(bench: ModuleType, tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    assert bench.write_items(one, 200_000) == bench.write_items(two, 200_000) == len(one.read_text().splitlines())
    assert one.read_bytes() == two.read_bytes() and 200_000 <= one.stat().st_size < 210_000


def test_memory_is_seen_in_children_and_shared_pages_count_once(bench: ModuleType) -> None:
    hold = "import os, sys\nx = bytearray(os.urandom(64 * 2**20))\n"
    fork = "if os.fork() == 0:\n    sys.stdin.read()\n    os._exit(0)\n"
    wait = "print('ready', flush=True)\nsys.stdin.read()\nos.wait()\n"
    command = [sys.executable, "-c", hold + fork + wait]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        pids = bench._tree(process.pid)
        seen = sum(bench._proportional_anonymous(pid) for pid in pids)
        resident = bench._field(Path(f"/proc/{process.pid}/status"), "VmHWM:")
        process.communicate("")
    assert len(pids) == 2 and pids[0] == process.pid
    assert 64 * MEBIBYTE < seen < 96 * MEBIBYTE, "the child's copy is the parent's pages"
    assert resident > 64 * MEBIBYTE
    assert bench._tree(os.getpid())[0] == os.getpid()


def test_the_report_says_what_the_large_file_takes(bench: ModuleType) -> None:
    small = {"file": "small", "size": MEBIBYTE, "items": 10, "tokens_on_disk": MEBIBYTE, "seconds": 1.0}
    runs = [
        {**small, "anonymous": 400 * MEBIBYTE, "resident": 500 * MEBIBYTE},
        {**small, "file": "large", "size": 100 * MEBIBYTE, "anonymous": 430 * MEBIBYTE, "resident": 590 * MEBIBYTE},
    ]
    results = {"command": "x", "machine": {"device": "CPU"}, "runs": runs}
    assert "takes 30 MiB more of anonymous memory and 90 MiB more resident.\nTarget, less" in bench.report(results)
    assert "less than 1,024 MiB: held." in bench.report(results)
    runs[1]["resident"] = 1524 * MEBIBYTE
    assert "less than 1,024 MiB: missed." in bench.report(results)
