"""What `srun` says, and when a process is one of its tasks. The variables are those that SLURM 23 and 24 set."""

from __future__ import annotations

import pytest

from cofitune.launch.slurm import adopt_task, first_node

JOB = {
    "SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
STEP = JOB | {
    "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
SHELL = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "34889"}


def test_a_task_of_srun_is_a_rank() -> None:
    environment = dict(STEP)
    adopt_task(environment, at_terminal=False)
    assert environment == STEP | {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(10_000 + (70_001 + 997) % 20_000),
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,  # a batch script: the job's tasks are counted, but this is not one of them
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu07"},  # salloc
        SHELL,
        STEP | {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0"},  # torchrun, started by srun
    ],
)
def test_other_processes_of_a_job_are_not(environment: dict[str, str]) -> None:
    after = dict(environment)
    adopt_task(after, at_terminal=True)
    assert after == environment


def test_a_step_below_an_interactive_shell_is_one() -> None:
    environment = dict(SHELL)
    adopt_task(environment, at_terminal=False)
    assert environment["WORLD_SIZE"] == "4"


def test_a_given_meeting_point_is_kept() -> None:
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_task(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_two_steps_of_one_job_meet_at_different_ports() -> None:
    other = STEP | {"SLURM_STEP_ID": "2"}
    adopt_task(other)
    first = dict(STEP)
    adopt_task(first)
    assert first["MASTER_PORT"] != other["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-03,07],gpu1", "node01"),
        ("gpu1,node[01-03]", "gpu1"),
        ("node[007]", "node007"),
        ("node[7,1-3]-ib", "node7-ib"),
        ("rack[2-3]node[01-03,07],gpu1", "rack2node01"),
        ("a.b-c.example", "a.b-c.example"),
        ("", ""),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
