"""A hostfile, and the same command started on every host in it through ssh. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from cofitune import __version__
from cofitune.errors import UserError
from cofitune.launch.interrupts import termination_signals

SSH = "ssh -o BatchMode=yes"  # no question for a password that nobody sees
SSH_FAILED = 255  # ssh's own exit code where it could not do its part
SECONDS_TO_ANSWER = 60  # for a host's first word
SECONDS_BETWEEN_LOOKS = 0.1
NAME = r"\w[\w.@:%+-]*"  # of a host: ssh would take a leading dash as an option
SECONDS_TO_END = 60  # for hosts that were told to end, before their connection is cut
# variables that go along to the hosts, by their first letters
CARRIED = (
    "COFITUNE_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTHON", "TORCH_", "TRANSFORMERS_",
    "UCX_", "WANDB_",
)  # fmt: skip
# a host first reads one line of standard input: the variables. They may be secrets, which stand on no command line.
# Byte by byte, since what follows are signals for the process that takes this one's place
START = (
    "import json, os, sys; "
    "line = b''.join(iter(lambda: os.read(0, 1) or sys.exit('no variables came'), b'\\n')); "
    "os.environ.update(json.loads(line)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
ANSWER = "import socket, cofitune; s = socket.create_server(('', 0)); print(cofitune.__version__, s.getsockname()[1])"


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a name that ssh knows, and how many ranks it takes."""

    name: str
    slots: int


@dataclass(frozen=True)
class Place:
    """One host among those of a launch.

    Attributes:
        number: the host's, counted from 0 in the order of the hostfile.
        num_hosts: how many there are.
        num_ranks: ranks on this host.
        endpoint: `name:port` on the first host, where all ranks meet.
        run_id: the same on all hosts of one launch.
    """

    number: int
    num_hosts: int
    num_ranks: int
    endpoint: str
    run_id: str

    def dump(self) -> str:
        """As one argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Place:
        """What `dump` wrote."""
        return cls(**json.loads(text))


def read_hostfile(path: Path) -> list[Host]:
    """Read DeepSpeed's form: `worker-1 slots=8` a line; `#` begins a comment.

    Raises:
        UserError: every line that is wrong, by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows' editors write a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        result = re.fullmatch(rf"({NAME})\s+slots=0*([1-9][0-9]{{0,4}})", text)
        if result and result[1] not in hosts:
            hosts[result[1]] = Host(result[1], int(result[2]))
        elif result and result[1] in hosts:
            problems.append(f"{path}:{number}: {result[1]} is named twice; add its slots up in one line")
        elif text:
            problems.append(
                f"{path}:{number}: '{text:.80}' is not `NAME slots=N`: NAME as ssh takes it, without quotes or "
                "brackets, and N a whole number of ranks from 1"
            )
    if not problems and not hosts:
        problems.append(f"{path}: no host in it; write `NAME slots=N`, one a line")
    if problems:
        raise UserError("\n".join(problems))
    return list(hosts.values())


def run_hosts(hosts: Sequence[Host], arguments: Sequence[str]) -> int:
    """Start `cofitune <arguments>` on every host's ranks, in this folder, and wait.

    The first host that fails ends the others. A signal to this process goes to all of them. ssh keeps a line to each
    host open: where it breaks, or this process dies, the ranks over there end too.

    Returns:
        0, or the exit code of the first host that failed.

    Raises:
        UserError: a host cannot be reached, or has not what this one has.
    """
    port = _find_port(hosts)
    run_id = uuid.uuid4().hex
    lines: list[subprocess.Popen[bytes]] = []
    with _passing_on_signals(lines) as received:
        for number, host in enumerate(hosts):
            name = hosts[0].name.rpartition("@")[2]  # without the user's name that ssh may need
            place = Place(number, len(hosts), host.slots, f"{name}:{port}", run_id)
            command = _there(["-m", "cofitune", "_host", place.dump(), *arguments])
            # a session of its own: an interrupt at the keyboard must reach the ranks through us, not end ssh
            line = subprocess.Popen([*_ssh(host), command], stdin=subprocess.PIPE, start_new_session=True)
            _send(line, _variables())
            missed = list(received)  # while it was started
            lines.append(line)
            for signum in missed:
                _tell([line], signum)
        code = _wait(lines)
    lost = [host.name for host, line in zip(hosts, lines, strict=True) if line.returncode == SSH_FAILED]
    if lost:
        print(f"error: ssh lost {', '.join(lost)}", file=sys.stderr)
    return code


def follow_parent_signals() -> None:
    """On a host: take signals from the line to the one who started us, and end where it breaks."""

    def obey() -> None:
        for number in sys.stdin:
            os.kill(os.getpid(), int(number))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=obey, daemon=True).start()


def _find_port(hosts: Sequence[Host]) -> int:
    """A free port on the first host; on the way, whether every host answers and has this cofitune in this folder."""
    questions = [
        subprocess.Popen(
            [*_ssh(host), _there(["-c", ANSWER])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for host in hosts
    ]  # fmt: skip
    answers, problems = [], []
    end = time.monotonic() + SECONDS_TO_ANSWER
    for host, question in zip(hosts, questions, strict=True):
        try:
            out, err = question.communicate(_variables(), timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            question.kill()
            out, err = "", f"no answer in {SECONDS_TO_ANSWER} seconds"
        words = out.split()[-2:]  # a shell over there may have said something first
        if question.returncode or len(words) < 2:
            problems.append(f"{host.name}: {(err.strip().splitlines() or ['no answer'])[-1]}")
        elif words[0] != __version__:
            problems.append(f"{host.name}: has cofitune {words[0]}, here it is {__version__}")
        answers.append(words)
    if problems:
        needs = f"ssh without a password, and there as here the folder {Path.cwd()} and {sys.executable}"
        raise UserError("--hostfile: not every host can take ranks (each needs " + needs + "):\n" + "\n".join(problems))
    return int(answers[0][1])


def _ssh(host: Host) -> list[str]:
    return [*shlex.split(os.environ.get("COFITUNE_SSH", SSH)), host.name]


def _there(arguments: Sequence[str]) -> str:
    """One line for another host's shell: this folder, and Python with these arguments once it has our variables."""
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([sys.executable, '-c', START, *arguments])}"


def _variables() -> str:
    """The first line of a host's standard input."""
    return json.dumps({name: value for name, value in os.environ.items() if name.startswith(CARRIED)}) + "\n"


def _send(line: subprocess.Popen[bytes], text: str) -> None:
    if line.stdin and line.poll() is None:
        with suppress(OSError):  # it ends at this very moment
            os.write(line.stdin.fileno(), text.encode())


def _wait(lines: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; the first failure ends the others, and cuts their line when they take too long."""
    failed = 0
    end = float("inf")
    while None in (codes := [line.poll() for line in lines]):
        if any(codes) and not failed:
            failed, end = next(code for code in codes if code), time.monotonic() + SECONDS_TO_END
            _tell(lines, signal.SIGTERM)
        if time.monotonic() > end:
            for line in lines:
                line.kill()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    failed = failed or next((code for code in codes if code), 0)
    return 128 - failed if failed < 0 else failed


def _tell(lines: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for line in lines:
        _send(line, f"{int(number)}\n")


@contextmanager
def _passing_on_signals(lines: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Within the context a signal goes to all lines of that moment; yields the signals that have come."""
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        _tell(lines, number)

    before = {number: signal.signal(number, pass_on) for number in termination_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for line in lines:
            if line.stdin:
                with suppress(OSError):
                    line.stdin.close()
