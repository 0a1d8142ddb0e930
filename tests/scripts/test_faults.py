"""Broken commands in short: `scripts/bench/faults` breaks every command, a hundred times."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The script as a module, with a temporary folder of its own: it looks there for what the commands leave."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("COFITUNE_CACHE", str(tmp_path / "cache"))
    import faults

    yield faults
    for name in ("faults", "fault_commands", "fault_kinds", "kill"):
        sys.modules.pop(name, None)


def test_a_command_that_was_broken_ends_as_if_nothing_had_happened(faults: Any, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    made = faults.run(faults.Faults(tmp_path, 5, ["importance"]), range(1), log)
    assert [(fault.kind, fault.problem) for fault in made] == [("kill", "")] and made[0].code
    assert f"Code: {made[0].code} (1)." in faults.report(made, 5)
    assert faults.run(faults.Faults(tmp_path / "never", 5, ["importance"]), range(1), log) == made, "the log is kept"


def test_what_a_fault_leaves_behind_is_seen(faults: Any, tmp_path: Path) -> None:
    names = (".x.0123abcd.cofitune.tmp", ".train.lock", ".step-000002.tmp", ".whole.building")
    assert all(faults.is_left(tmp_path / name) for name in names)
    assert not any(faults.is_left(tmp_path / name) for name in ("config.yaml", "delta.safetensors", "step-000002"))
