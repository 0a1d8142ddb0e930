"""Ranks on several machines: the hostfile, the lines of ssh, and a real training on two hosts.

The hosts are network namespaces joined by a virtual cable where this machine lets us make them, else this machine under
two of its loopback addresses. A script stands for ssh: it runs the command in the namespace named.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune.errors import UserError
from cofitune.launch.hostfile import Host, Place, read_hostfile, run_hosts
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

CABLE = "cft0"


def test_a_hostfile_is_deepspeeds(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "\ufeffworker-1 slots=8\n\nroot@10.0.0.2   slots=4  # half of it\r\n# ours\nfe80::1%eth0\tslots=02\n"
    )
    assert read_hostfile(path) == [Host("worker-1", 8), Host("root@10.0.0.2", 4), Host("fe80::1%eth0", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\nb\n", "hosts:2: 'b' is not `NAME slots=N`"),
        ("a slots=0\n", "hosts:1: 'a slots=0' is not"),
        (f"a slots={'9' * 5000}\n", "hosts:1: 'a slots=999"),
        ('"a" slots=1\n', "hosts:1: '\"a\" slots=1' is not .* without quotes or brackets"),
        ("[fe80::1] slots=1\n", "hosts:1: .* without quotes or brackets"),
        ("a slots = 1\n", "hosts:1: 'a slots = 1' is not"),
        ("a slots=x\nb slot=2\n", "hosts:2: 'b slot=2' is not"),
        ("a slots=1\na slots=2\n", "hosts:2: a is named twice"),
        ("-oProxyCommand=x slots=1\n", "hosts:1: "),
        ("# none\n", "no host in it"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_hostfile_is_refused_by_its_lines(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_place_survives_the_command_line() -> None:
    place = Place(1, 2, 8, "worker-1:1234", "id")
    assert Place.parse(place.dump()) == place


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_host_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = '[ "$1" = far ] && { echo "far: Connection refused" >&2; exit 255; }; exec bash -c "$2"'
    monkeypatch.setenv("COFITUNE_SSH", script(tmp_path / "ssh", refuse))
    with pytest.raises(UserError, match="(?s)not every host can take ranks.*\nfar: far: Connection refused$"):
        run_hosts([Host("near", 1), Host("far", 1)], ["train"])


# stands for `cofitune _host`: it does what its host is called, and notes how it ended
STAND_IN = """
import pathlib, signal, sys, time
from cofitune.launch.hostfile import follow_parent_signals
def note(number, _):
    pathlib.Path(sys.argv[2], sys.argv[1]).write_text(str(number))
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
sys.stdin.readline()  # the variables
follow_parent_signals()
pathlib.Path(sys.argv[2], sys.argv[1] + ".began").touch()
end = time.monotonic() + {"fails": 0.5, "waits": 60, "also": 60}[sys.argv[1]]
while time.monotonic() < end:  # one long sleep could begin just behind a signal, and would not hear of it
    time.sleep(0.05)
sys.exit(7)
"""
RUN = """
import sys
from cofitune.launch.hostfile import Host, run_hosts
sys.exit(run_hosts([Host(name, 1) for name in sys.argv[1:]], []))
"""


def start(tmp_path: Path, *hosts: str) -> subprocess.Popen[str]:
    """run_hosts in a process of its own, its hosts played by stand-ins."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    stand_in = f'exec {sys.executable} {tmp_path}/stand_in.py "$1" {tmp_path}'
    play = f'case "$2" in *" _host "*) {stand_in};; esac; exec bash -c "$2"'
    environment = os.environ | {"COFITUNE_SSH": script(tmp_path / "ssh", play)}
    return subprocess.Popen([sys.executable, "-c", RUN, *hosts], env=environment, text=True, stderr=subprocess.PIPE)


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 300
    while not all(path.exists() and (path.suffix or path.read_text()) for path in paths):
        assert time.monotonic() < end, f"no sign of {paths}"
        time.sleep(0.05)


NOTE = """
import os, pathlib, sys
# Python reads this file at its start; it stands for `cofitune _host`
if "_host" in sys.orig_argv and "-c" not in sys.orig_argv:
    note = os.environ["HF_TOKEN"] + os.environ.get("UNRELATED", "")
    pathlib.Path(__file__).with_name("seen").write_text(note)
    os._exit(0)
"""


def test_variables_reach_a_host_and_stand_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token on a command line is shown to every user of that host for as long as the training runs."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTE)
    unset = "; ".join(f"unset {name}" for name in ("HF_TOKEN", "UNRELATED", "PYTHONPATH"))
    play = f'echo "$2" >> {tmp_path}/typed; {unset}; exec bash -c "$2"'
    monkeypatch.setenv("COFITUNE_SSH", script(tmp_path / "ssh", play))
    monkeypatch.setenv("HF_TOKEN", "a secret 'of' mine")
    monkeypatch.setenv("UNRELATED", "stays here")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    assert run_hosts([Host("near", 1)], ["train"]) == 0
    assert (tmp_path / "site" / "seen").read_text() == "a secret 'of' mine"
    typed = (tmp_path / "typed").read_text()
    assert " _host " in typed and "secret" not in typed and "PYTHONPATH" not in typed


def test_the_first_host_that_fails_ends_the_others_and_gives_the_code(tmp_path: Path) -> None:
    process = start(tmp_path, "waits", "fails", "also")
    assert process.wait(300) == 7
    assert {(tmp_path / name).read_text() for name in ("waits", "also")} == {str(int(signal.SIGTERM))}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_host(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "waits", "also")
    wait_for(tmp_path / "waits.began", tmp_path / "also.began")
    process.send_signal(number)
    assert process.wait(300) == 128 + number
    assert {(tmp_path / name).read_text() for name in ("waits", "also")} == {str(int(number))}


def test_hosts_end_when_the_one_who_started_them_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "waits", "also")
    wait_for(tmp_path / "waits.began", tmp_path / "also.began")
    process.kill()
    wait_for(tmp_path / "waits", tmp_path / "also")


@dataclass(frozen=True)
class Hosts:
    """Two hosts: their names, what stands for ssh, and what must be set for gloo to find the cable."""

    names: tuple[str, str]
    ssh: str
    environment: dict[str, str]


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    spaces = [f"cofitune-{os.getpid()}-{side}" for side in "ab"]
    commands = [f"netns add {space}" for space in spaces]
    commands += [f"-n {spaces[0]} link add {CABLE} type veth peer name {CABLE} netns {spaces[1]}"]
    for number, space in enumerate(spaces, start=1):
        commands += [f"-n {space} addr add 10.213.7.{number}/24 dev {CABLE}"]
        commands += [f"-n {space} link set {CABLE} up", f"-n {space} link set lo up"]
    enter = 'exec ip netns exec "cofitune-{}-$([ "$1" = 10.213.7.1 ] && echo a || echo b)" bash -c "$2"'
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "exec", spaces[0], "true"], check=True, capture_output=True)
        made = Hosts(
            ("10.213.7.1", "10.213.7.2"),
            script(tmp_path / "ssh", enter.format(os.getpid())),
            {"GLOO_SOCKET_IFNAME": CABLE},
        )
    except (OSError, subprocess.CalledProcessError):  # no such right, or no such tool
        made = Hosts(("127.0.0.2", "127.0.0.3"), script(tmp_path / "ssh", 'exec bash -c "$2"'), {})
    try:
        yield made
    finally:
        with suppress(OSError):
            for space in spaces:
                subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    words = ["court", "contract", "void", "seller", "buyer"]
    items = [{"instruction": f"Say {word}", "output": word * 2} for word in words]
    write_jsonl(tmp_path / "items.jsonl", items)
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "items.jsonl")},
        "train": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 1},
    }


def launch(
    config: dict[str, Any], folder: Path, environment: dict[str, str], *options: str, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Type `cofitune train` for a run in this folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | {"output_dir": str(folder)}))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "cofitune", "train", str(path), *options],
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def outcome(folder: Path, *processes: subprocess.Popen[str]) -> str:
    """Wait, and give the hash of what was trained."""
    output = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), output
    assert "".join(out for out, _ in output).count("what trains") == 1, "rank 0 alone talks"
    return hashlib.sha256((folder / "train" / "delta.safetensors").read_bytes()).hexdigest()


def free_port() -> str:
    with socket.create_server(("", 0)) as server:
        return str(server.getsockname()[1])


def test_two_hosts_of_one_rank_train_what_one_host_of_two_does(
    two_hosts: Hosts, config: dict[str, Any], tmp_path: Path
) -> None:
    together = tmp_path / "together"
    expected = outcome(together, launch(config, together, {}, "--num-processes", "2"))

    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in two_hosts.names))
    environment = {"COFITUNE_SSH": two_hosts.ssh, **two_hosts.environment}
    apart = tmp_path / "apart"
    assert outcome(apart, launch(config, apart, environment, "--hostfile", str(hostfile))) == expected


def test_ranks_of_torchrun_and_of_srun_train_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank {node} --master-addr 127.0.0.1 "
        f"--master-port {port}"
        for node in range(2)
    ]
    torchrun = tmp_path / "torchrun"
    expected = outcome(torchrun, *[launch(config, torchrun, {}, launcher=tuple(node.split())) for node in nodes])

    srun = tmp_path / "srun"
    tasks = [
        {
            "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task),
            "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
            "MASTER_PORT": free_port(),
        }
        for task in range(2)
    ]  # fmt: skip
    tasks[1]["MASTER_PORT"] = tasks[0]["MASTER_PORT"]
    assert outcome(srun, *[launch(config, srun, task) for task in tasks]) == expected


def test_a_port_that_is_taken_is_one_message(config: dict[str, Any], tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = launch(config, tmp_path / "run", rank)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert [line for line in err.splitlines() if "Traceback" in line or "error" in line] == [
        f"error: MASTER_PORT {port} on 127.0.0.1 is taken by another process: export another MASTER_PORT (torchrun: "
        "--master-port, or --standalone on one machine)"
    ]
