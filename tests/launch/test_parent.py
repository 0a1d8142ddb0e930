"""A launcher that is killed takes its ranks along; what they had trained is saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.processes

STEPS = 100_000  # never reached


def test_ranks_of_a_killed_launcher_save_their_state_and_end(tmp_path: Path, tiny_model_folder: Path) -> None:
    item = json.dumps({"instruction": "Say void", "output": "void"})
    (tmp_path / "items.jsonl").write_text(f"{item}\n" * 1000)  # an epoch does not end before the signal
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "items.jsonl")},
        "train": {"max_steps": STEPS, "per_device_train_batch_size": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "cofitune", "train", str(tmp_path / "c.yaml"), "--num-processes", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ranks: list[int] = []
    try:
        metrics = tmp_path / "run" / "train" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, 120)
        ranks = children_of(process.pid)
        assert len(ranks) >= 2  # and what they have started for a moment
        process.kill()
        process.wait()
        wait_for(lambda: not any(is_alive(rank) for rank in ranks), 60)
    finally:
        process.kill()
        for rank in filter(is_alive, ranks):
            os.kill(rank, signal.SIGKILL)
    saved = list((tmp_path / "run" / "train" / "checkpoints").iterdir())
    steps = len(metrics.read_text().splitlines())
    assert [path.name for path in saved] == [f"step-{steps:06d}"], "the state after the last step"


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)


def children_of(parent: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in out.split()]


def is_alive(pid: int) -> bool:
    """A zombie, which nobody has waited for, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
