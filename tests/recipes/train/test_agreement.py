"""Ranks on machines with copies of their own: what differs is named before anything is trained."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import REPOSITORY, outside_ranks, write_jsonl

pytestmark = pytest.mark.processes


@pytest.mark.interpreter  # whose PYTHONPATH has packages of its own
def test_another_copy_of_data_config_or_packages_is_named(tmp_path: Path, tiny_model_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, machine in enumerate(("a", "b")):
        here = tmp_path / machine
        shutil.copytree(tiny_model_folder, here / "model")
        write_jsonl(here / "items.jsonl", ({"instruction": f"{n}", "output": "yes"} for n in range(8 + rank)))
        config = {
            "model": {"name": "model", "dtype": "float32"}, "data": {"train": "items.jsonl"},
            "train": {"max_steps": 2, "per_device_train_batch_size": 1, "seed": rank}, "output_dir": "run",
        }  # fmt: skip
        (here / "config.yaml").write_text(yaml.safe_dump(config))
        package = here / "packages" / f"deepspeed-9.{rank}.dist-info" / "METADATA"
        package.parent.mkdir(parents=True)
        package.write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.{rank}\n")
        environment = {
            **outside_ranks(), "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": port, "PYTHONPATH": f"{here / 'packages'}:{REPOSITORY}",
            "COFITUNE_CACHE": str(here / "cache"),
        }  # fmt: skip
        command = [sys.executable, "-m", "cofitune", "train", "config.yaml"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=here, env=environment, **pipes))  # type: ignore[call-overload]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], messages
    assert "error: the ranks disagree: rank 1 on " in messages[0] and "Traceback" not in "".join(messages)
    for difference in (
        "packages.deepspeed is '9.0' there and '9.1' here",
        "items is 8 there and 9 here",
        "data.train.0.sha256 is ",
        "train.seed is 0 there and 1 here",
    ):
        assert difference in messages[0], messages[0]
    assert not (tmp_path / "a" / "run").exists()
