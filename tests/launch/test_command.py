"""A cofitune command typed in a process of its own: why it failed is the last thing that it said."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.launch.command import run_command
from cofitune.launch.launcher import Ranks

HERE = Ranks(1, (), ())


@pytest.mark.processes
def test_a_failed_command_is_told_by_its_last_line_and_the_log_keeps_all(tmp_path: Path) -> None:
    log = tmp_path / "new" / "run.log"
    assert run_command(["--version"], log, HERE) is None
    assert log.read_text().startswith("cofitune ")
    failure = run_command(["train", str(tmp_path / "none.yaml")], log, HERE)
    assert failure == f"error: {tmp_path}/none.yaml: no such config file (exit 2; {log})"
    assert log.read_text().startswith("cofitune ") and "no such config file" in log.read_text()
