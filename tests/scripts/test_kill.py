"""The kill test in short: `scripts/bench/kill` does thirty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "kill.py"


def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(SCRIPT), "--kills", "2", "--out", str(tmp_path / "kill.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "are, bit for bit, those of the run that nobody killed" in (tmp_path / "kill.md").read_text()
