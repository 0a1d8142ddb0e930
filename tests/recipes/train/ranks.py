"""Two ranks of `cofitune train` on machines of their own: each in a folder of its own, with a cache of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import REPOSITORY, outside_ranks


def train_apart(machines: Sequence[Path]) -> list[tuple[int, str]]:
    """Type `cofitune train config.yaml` in each folder, as ranks of one training; each one's exit code and stderr.

    Packages below a folder's `packages` are found before the installed ones.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, here in enumerate(machines):
        environment = {
            **outside_ranks(), "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(machines)),
            "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": f"{here / 'packages'}:{REPOSITORY}",
            "COFITUNE_CACHE": str(here / "cache"),
        }  # fmt: skip
        command = [sys.executable, "-m", "cofitune", "train", "config.yaml"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=here, env=environment, **pipes))  # type: ignore[call-overload]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, message) for process, message in zip(processes, messages, strict=True)]
