"""What rank 0 alone does: its result on every rank, and its mistake too, so that none waits for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import run_ranks
from tests.training import sharded_cases

pytestmark = pytest.mark.processes

RANK = """
import sys
import torch
from cofitune.errors import UserError
from cofitune.distributed import run_on_rank_zero

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
done = []
assert run_on_rank_zero(lambda: done.append(rank) or {"from": rank}) == {"from": 0}
assert done == [0] * (rank == 0), "the other rank does nothing"

def fail():
    raise UserError("the disk is full")

try:
    run_on_rank_zero(fail)
except UserError as error:
    print(f"rank {rank}: {error}, everywhere: {error.everywhere}\\n", end="", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_a_result_and_a_mistake_of_rank_0_are_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0: the disk is full, everywhere: False",
        "rank 1: the disk is full, everywhere: True",
    ]


def test_what_rank_0_does_alone_may_outlast_a_steps_timeout(tmp_path: Path) -> None:
    sharded_cases.tiny_model().save_pretrained(tmp_path / "model")
    run_ranks("training.waiting_cases", tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()], "written whole, and read again"
