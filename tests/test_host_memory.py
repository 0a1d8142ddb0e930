"""What a process may use of the host's memory, on trees of files as hosts and containers show them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cofitune import host_memory
from cofitune.host_memory import free_memory, usable_memory
from cofitune.ranks import Rank
from cofitune.recipes.importance import plan as importance_plan
from cofitune.recipes.trial import prefix_cache as trial_prefix
from cofitune.training import prefix_cache as prefix

GIB = 2**30
UNLIMITED = {1: str(2**63 - 4096), 2: "max"}


def make_host(root: Path, groups: str, files: dict[str, object]) -> Path:
    """A host of 512 GiB, 400 of them free: the lines of /proc/self/cgroup, and files below /sys/fs/cgroup."""
    meminfo = f"MemTotal: {512 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {400 * 2**20} kB\n"
    written = {"proc/meminfo": meminfo, "proc/self/cgroup": groups}
    written |= {f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in files.items()}
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(version: int, folder: str, limit: object, used: int = 0, cache: int = 0) -> dict[str, object]:
    """One control group's files."""
    if version == 2:
        stat = f"anon 1\nfile 2\ninactive_file {cache}"
        return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}
    place, stat = f"memory/{folder}", f"inactive_file 0\ntotal_inactive_file {cache}"
    names = (("memory.limit_in_bytes", limit), ("memory.usage_in_bytes", used), ("memory.stat", stat))
    return {f"{place}{name}": value for name, value in names}


V1_LINES = "5:devices:/a\n4:memory:{}\n0::/\n"


@pytest.mark.parametrize(
    "lines, files",
    [
        pytest.param("0::/\n", group(2, "", 8 * GIB, 3 * GIB, GIB), id="a container under v2"),
        pytest.param("0::/../pod/x\n", group(2, "", 8 * GIB, 3 * GIB, GIB), id="started from outside its namespace"),
        pytest.param(
            "0::/job/step/t\n",
            group(2, "job/", 8 * GIB, 3 * GIB, GIB) | group(2, "job/step/t/", "max") | group(2, "job/step/", 9 * GIB),
            id="the limit is an ancestor's, the tightest counts",
        ),
        pytest.param(V1_LINES.format("/"), group(1, "", 8 * GIB, 3 * GIB, GIB), id="v1"),
        pytest.param(
            V1_LINES.format("/docker/4f"), group(1, "", 8 * GIB, 3 * GIB, GIB), id="v1: the host's path, our own mount"
        ),
        pytest.param(
            V1_LINES.format("/job/task"),
            group(1, "job/", 8 * GIB, 3 * GIB, GIB) | group(1, "job/task/", UNLIMITED[1]) | group(1, "", UNLIMITED[1]),
            id="v1: an ancestor's",
        ),
        pytest.param("4:cpu,memory:/j\n", group(1, "j/", 8 * GIB, 3 * GIB, GIB), id="v1: two controllers together"),
    ],
)
def test_the_tightest_limit_above_the_process_counts(tmp_path: Path, lines: str, files: dict[str, object]) -> None:
    root = make_host(tmp_path, lines, files)
    assert usable_memory(root) == 8 * GIB
    assert free_memory(root) == 6 * GIB, "cached files are given back when memory is wanted"


@pytest.mark.parametrize(
    "lines, files",
    [
        ("", {}),
        ("0::/\n", group(2, "", UNLIMITED[2], 9 * GIB)),
        (V1_LINES.format("/"), group(1, "", UNLIMITED[1], 9 * GIB)),
        ("0::/\n", group(2, "other/", GIB)),
    ],
)
def test_without_a_limit_it_is_the_host(tmp_path: Path, lines: str, files: dict[str, object]) -> None:
    root = make_host(tmp_path, lines, files)
    assert usable_memory(root) == 512 * GIB
    assert free_memory(root) == 400 * GIB


def test_no_less_than_nothing_is_free_and_a_host_without_proc_has_memory(tmp_path: Path) -> None:
    assert free_memory(make_host(tmp_path / "full", "0::/\n", group(2, "", GIB, 2 * GIB))) == 0
    unread = {
        name: text for name, text in group(2, "", GIB, 0, GIB // 2).items() if not name.endswith("memory.current")
    }
    assert free_memory(make_host(tmp_path / "unread", "0::/\n", unread)) == GIB, "no more than the limit"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory(tmp_path / "nowhere") == pages
    assert 0 < free_memory() <= usable_memory() <= pages


def test_importance_and_the_prefix_cache_see_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_host(tmp_path, "0::/\n", group(2, "", GIB, GIB // 2))
    monkeypatch.setattr(importance_plan, "usable_memory", lambda: host_memory.usable_memory(root))
    for module in (prefix, trial_prefix):
        monkeypatch.setattr(module, "free_memory", lambda: host_memory.free_memory(root))
    monkeypatch.setattr(importance_plan, "device_of", lambda rank: torch.device("cpu"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert importance_plan.device_memory(Rank(world_size=4)) == GIB // 4
    plan = prefix.PrefixPlan("layers", 1, [1], 1, torch.float32, prefix.SHARED_MEMORY)
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * GIB))
    assert plan.free_bytes == GIB // 2
    monkeypatch.setattr(trial_prefix, "layer_bytes", lambda plan, items: GIB)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    config = SimpleNamespace(search=SimpleNamespace(prefix_cache="memory"))
    shared, trial = SimpleNamespace(kept_layers=()), SimpleNamespace(region=SimpleNamespace(first=3), config=config)
    keeps, message = trial_prefix.has_room(cast(Any, shared), cast(Any, trial), None)
    assert not keeps and "no room for the 1.0 GiB of layer 3: 512 MiB are free" in message


TURNS = """
import resource, sys
from cofitune.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def turn():
    made = [bytearray(2**22) for _ in range(64)]
for _ in range(3):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.processes
@pytest.mark.interpreter
def test_freed_memory_is_used_again_without_the_system() -> None:
    """256 MiB of blocks that are made and freed once more: the system clears next to no page for them."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", TURNS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("given back", "kept")
    }
    assert faults["given back"] > 100  # with huge pages a fault clears 2 MiB
    assert faults["kept"] < faults["given back"] / 10
