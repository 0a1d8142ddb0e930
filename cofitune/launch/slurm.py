"""What `srun` tells the processes that it starts, in the variables that torchrun would have set. Imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, MutableMapping

from cofitune.ranks import VARIABLES

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that systems give away by themselves


def adopt_task(environment: MutableMapping[str, str], *, at_terminal: bool | None = None) -> None:
    """Where `srun` started this process as one of several tasks, make it a rank of as many.

    The variables of the *step* count, which `srun` alone sets: a batch script has the job's (SLURM_NTASKS, and
    SLURM_PROCID=0) and is one process, and so is a shell under `srun --pty`. A launcher below `srun`, such as torchrun,
    has the last word. MASTER_ADDR and MASTER_PORT are kept where they are given.

    Args:
        environment: read and completed.
        at_terminal: whether someone types here; by default, whether the standard input is a terminal.
    """
    if all(name in environment for name in VARIABLES):
        return
    tasks, task, local = (environment.get(f"SLURM_{n}", "") for n in ("STEP_NUM_TASKS", "PROCID", "LOCALID"))
    if not (tasks.isdigit() and task.isdigit() and local.isdigit() and int(tasks) > 1):
        return
    if "SLURM_PTY_PORT" in environment and (sys.stdin.isatty() if at_terminal is None else at_terminal):
        return
    environment.update(RANK=task, WORLD_SIZE=tasks, LOCAL_RANK=local)
    if here := _tasks_here(environment):
        environment.setdefault("LOCAL_WORLD_SIZE", str(here))
    environment.setdefault("MASTER_ADDR", first_node(environment.get("SLURM_STEP_NODELIST", "")) or "127.0.0.1")
    job, step = (int(environment.get(f"SLURM_{name}_ID", "0")) for name in ("JOB", "STEP"))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + 997 * step) % NUM_PORTS))  # 997: steps lie apart


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node, by SLURM's short form: `4(x2),3` are four on each of two nodes, and three."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def first_node(nodes: str) -> str:
    """The first name of SLURM's list form: `rack[2-3]node[01-03,07],gpu1` begins with `rack2node01`.

    `scontrol show hostnames` would give all of them; asked by every rank at once it is a burden on the controller, and
    containers lack it.
    """
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group() if first else "")
