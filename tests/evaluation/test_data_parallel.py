"""What ranks of an evaluation tell each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cofitune.evaluation.data_parallel import BatchSharding

SCRIPT = """
import os
from cofitune.evaluation.data_parallel import join

rank = int(os.environ["RANK"])
share = join(rank, 2)
print(rank, share.least({"law": (64, 8)[rank], "know": (2, 16)[rank]}), flush=True)
"""


@pytest.mark.processes
def test_two_ranks_take_the_smaller_of_their_batches(tmp_path: Path) -> None:
    """The rank whose device has least room must not run out of memory."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} {{'law': 8, 'know': 2}}" for rank in range(2)]


def test_one_rank_keeps_its_own() -> None:
    assert BatchSharding().least({"law": 4}) == {"law": 4}
