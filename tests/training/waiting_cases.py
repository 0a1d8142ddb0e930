"""On two real ranks, what rank 0 does alone takes longer than a step's collectives may: for test_distributed.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.helpers import freeze_imports
from tests.training import sharded_cases as sharded
from tests.training import state_cases as cases

TIMEOUT, LONGER = 4, 5  # seconds: of a collective, and of rank 0's work


def main() -> None:
    """Rank 0 writes and reads slowly, and then is late for a collective of a step."""
    from cofitune.distributed import run_on_rank_zero
    from cofitune.training import state, state_check, state_files
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    start_distributed(TIMEOUT)
    freeze_imports()
    folder, case = Path(sys.argv[1]), sharded.Case("plain")
    rank, write = torch.distributed.get_rank(), state_files.write_tensors
    model, names, engine = sharded.start_case(case, folder, sharded.settings_of(case))
    assert names and model is not None

    def slowly(*arguments: Any) -> str:
        time.sleep(LONGER)
        return write(*arguments)

    state_files.write_tensors, state_files.FILE_BYTES = slowly, 1  # type: ignore[assignment]  # a file each for the first tensors
    _limit_to_two_files(state_files)
    cases._fit(engine, sharded.plan_of(case), lambda record, _: None)
    state.save_state(folder / "checkpoints", engine, sharded.plan_of(case).num_steps, cases.IDENTITY, 1)

    def find() -> state_files.Checkpoint | None:
        time.sleep(LONGER)
        return state_check.newest_whole(folder / "checkpoints", print)

    found = run_on_rank_zero(find)
    assert found is not None and state.load_state(engine, found) == found.step
    _be_late(rank)
    print(f"rank {rank} has waited\n", end="", flush=True)
    torch.distributed.destroy_process_group()


def _limit_to_two_files(files: Any) -> None:
    """After the first file, tensors gather in one: the test need not take half an hour."""
    real = files.write_tensors

    def write(*arguments: Any) -> Any:
        files.FILE_BYTES = 2**30
        return real(*arguments)

    files.write_tensors = write


def _be_late(rank: int) -> None:
    """A step's collective still has the short timeout, so that a lost rank is noticed."""
    one = torch.ones(1)
    if rank == 0:
        time.sleep(LONGER)
        return
    try:
        torch.distributed.all_reduce(one)
    except RuntimeError:
        return
    raise AssertionError("a step's collective waited too long")


if __name__ == "__main__":
    main()
