"""A search's requests on ranks of this call: a worker that is started once and takes one request after the other.

A worker is `cofitune _worker`, as many processes as a trial has ranks, started by the launcher that `train` has. Its
rank 0 holds a line to the search: requests come in, what they took goes out, and where the line breaks, it ends. What a
trial leaves lies in its folder. A worker whose trial failed ends too, so that no trial meets what a failed one left.
"""

from __future__ import annotations

import json
import math
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from cofitune.config.load import dump_config
from cofitune.errors import UserError
from cofitune.files import remove_free_lock, write_text
from cofitune.launch.launcher import Ranks
from cofitune.orphan import end_with_parent
from cofitune.ranks import VARIABLES, is_launched, this_rank
from cofitune.recipes.trial.executor import Measured, TrialExecutor, TrialRequest, TrialResult
from cofitune.temporary import temporary_folder

LINE = "COFITUNE_WORKER"  # where the search is to be reached, `host:port:password`, as its worker's rank 0 finds it
SECONDS_TO_END = 20  # for a worker that is told to, before it is killed
SECONDS_OF_RANKS_TO_END = 10  # for its ranks, likewise
SECONDS_TO_SAY_WHY = 5  # for its launcher, once the ranks have ended
SECONDS_OF_HOSTS_TO_SAY_WHY = 60  # where there is one on each of several machines
SECONDS_TO_SAY_WHO = 5  # for who calls, before the call is taken for a stranger's
SECONDS_BETWEEN_LOOKS = 0.2


@contextmanager
def local_executor(ranks: Ranks, writes: Path | None = None) -> Iterator[TrialExecutor]:
    """Give what runs requests one after the other on these ranks; the worker ends with the context.

    It starts with the first request, and again after one that failed.

    Args:
        writes: the folder whose lock the worker holds, too: its lock file goes with the worker.
    """
    requests = _LocalExecutor(ranks)
    try:
        yield requests.run
    finally:
        requests.close()
        if writes is not None:
            remove_free_lock(writes)


def measure_trial(request: TrialRequest, ranks: Ranks) -> Measured:
    """Start a worker, take a few real steps of the request's region and answer a few items of each task; then end it.

    Nothing is written outside a temporary folder, which lies where the search would write if several hosts must see it.

    Raises:
        UserError: it failed; the message says why.
    """
    started = time.perf_counter()
    shared = _nearest_folder(request.folder) if ranks.hosts else None
    with temporary_folder("cofitune-measure-", shared) as folder:
        config = request.config.model_copy(update={"output_dir": str(folder)})
        worker = _Worker(ranks)
        try:
            worker.wait_until_ready()
            to_ready = time.perf_counter() - started
            here = replace(request, config=config, folder=folder.absolute())
            answer = worker.ask({"do": "measure", "request": here.to_json()})
            if answer is None:
                raise UserError(f"no trial could be measured: {worker.last_words(folder / 'trial.log')}")
        finally:
            worker.end()
    return Measured(**answer | {"seconds_to_start": to_ready + answer["seconds_to_start"]})


def serve() -> None:
    """What every rank of a worker does: carry out the search's requests until it hangs up."""
    if is_launched():  # a rank of ours, whose launcher may end without having ended it
        end_with_parent()
    from rich.console import Console

    from cofitune.recipes.trial.runner import TrialRunner

    first = this_rank().rank == 0
    runner = TrialRunner(Console(quiet=not first))
    line = _Line() if first else None  # only now: who is called takes the worker for ready
    while (message := runner.broadcast(line.next() if line else None)) is not None:
        request = TrialRequest.from_json(message["request"])
        _speak_into(request.folder / "trial.log")
        measures = message["do"] == "measure"
        answer = asdict(runner.measure(request)) if measures else runner.run(request).to_json()
        if line:
            line.answer(answer)


class _LocalExecutor:
    """Orders for one worker, which is there from the first one on."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._worker: _Worker | None = None

    def run(self, requests: Sequence[TrialRequest]) -> Iterator[TrialResult]:
        """As `TrialExecutor` says."""
        for request in requests:
            yield self._run(request)

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _run(self, request: TrialRequest) -> TrialResult:
        begun = time.perf_counter()
        write_text(request.folder / "trial.yaml", dump_config(request.config))  # for who looks into the folder
        if self._worker is None:
            self._worker = _Worker(self._ranks)
            self._worker.wait_until_ready()
        to_ready = time.perf_counter() - begun
        place = replace(request, folder=request.folder.absolute())
        answer = self._worker.ask({"do": "trial", "request": place.to_json()})
        if answer is None:
            result = TrialResult(request, self._worker.last_words(request.folder / "trial.log"))
            self.close()
        else:
            result = TrialResult.from_json(request, answer)
        whole = time.perf_counter() - begun
        seconds = {"start": 0.0, "train": 0.0, "evaluate": 0.0, **result.seconds}
        seconds["start"] += to_ready
        seconds["other"] = whole - sum(seconds.values())
        return replace(result, seconds={name: round(value, 3) for name, value in seconds.items()})


class _Worker:
    """The search's end of a worker. Everything here bears that its processes may die at any moment."""

    def __init__(self, ranks: Ranks) -> None:
        self._server = socket.create_server(("" if ranks.hosts else "127.0.0.1", 0))
        self._password = secrets.token_hex()
        host = socket.gethostname() if ranks.hosts else "127.0.0.1"
        line = f"{host}:{self._server.getsockname()[1]}:{self._password}"
        self._said = TemporaryFile()  # noqa: SIM115 -- open as long as the worker lives
        # inheritable files stay open in the worker: with them the search's lock, for as long as anyone writes
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cofitune", "_worker", *ranks.options],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            close_fds=False,
            start_new_session=True,  # an interrupt at the keyboard reaches it through us
            env={name: value for name, value in os.environ.items() if name not in VARIABLES}  # no rank yet
            | {LINE: line, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_OF_RANKS_TO_END)},
        )
        self._seconds_to_say_why = SECONDS_OF_HOSTS_TO_SAY_WHY if ranks.hosts else SECONDS_TO_SAY_WHY
        self._line: socket.socket | None = None
        self._unread = b""

    def wait_until_ready(self) -> None:
        """Wait for its rank 0's call, or for its end."""
        while self._line is None and self._process.poll() is None:
            if not select.select([self._server], [], [], SECONDS_BETWEEN_LOOKS)[0]:
                continue
            line, _ = self._server.accept()
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone hangs up, too
            self._line = line
            output: bytes | None = None
            with suppress(OSError):
                output = self._read(SECONDS_TO_SAY_WHO)
            if not secrets.compare_digest(output or b"", json.dumps(self._password).encode()):
                self._line.close()  # someone else's call
                self._line, self._unread = None, b""
        self._server.close()

    def ask(self, request: dict[str, object]) -> dict[str, Any] | None:
        """Give a request and wait for its answer; None where the worker ended over it."""
        if self._line is None:
            return None
        try:
            self._line.sendall(json.dumps(request).encode() + b"\n")
            text = self._read()
        except OSError:
            return None
        answer: dict[str, Any] | None = json.loads(text) if text else None
        return answer

    def last_words(self, log: Path) -> str:
        """Why it ended: the last line of the trial's log, to which goes what its launcher said."""
        with suppress(subprocess.TimeoutExpired):  # told to end before, the launcher would not say why a rank failed
            self._process.wait(SECONDS_OF_RANKS_TO_END + self._seconds_to_say_why)
        code = self._end()
        self._said.seek(0)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(self._said.read())
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return f"was killed from outside, as the system does when the machine's memory is full ({log})"
        output = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"{output[-1].strip() if output else 'no word'} (exit {code}; {log})"

    def end(self) -> None:
        """Hang up, which ends an idle worker, and tell a busy one to end."""
        self._end()
        self._said.close()

    def _end(self) -> int:
        if self._line is not None:
            self._line.close()
        self._server.close()
        with suppress(subprocess.TimeoutExpired):
            if self._line is not None:
                return self._process.wait(SECONDS_TO_END / 4)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(SECONDS_TO_END)
        self._process.kill()  # its ranks end with it
        return self._process.wait()

    def _read(self, seconds: float = math.inf) -> bytes | None:
        """The next line; None where the worker hung up or has ended, or where none came in so many seconds."""
        if self._line is None:
            return None
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ended = self._process.poll() is not None  # before the look, which may still find its last words
            if time.monotonic() > end:
                return None
            if not select.select([self._line], [], [], SECONDS_BETWEEN_LOOKS)[0]:
                if ended:
                    return None
                continue
            part = self._line.recv(2**16)
            if not part:
                return None
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\n")
        return text


class _Line:
    """A worker's end of the line to its search. Where the search is gone, a worker that is at work ends."""

    def __init__(self) -> None:
        host, port, password = os.environ[LINE].rsplit(":", 2)
        self._line = socket.create_connection((host, int(port)))
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._at_work = False
        self.answer(password)
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next request; None where there will be no more."""
        request = self._orders.get()
        self._at_work = request is not None
        return request

    def answer(self, answer: object) -> None:
        """Say that the last request is carried out."""
        self._at_work = False
        with suppress(OSError):  # the search is gone, and `next` will say so
            self._line.sendall(json.dumps(answer).encode() + b"\n")

    def _listen(self) -> None:
        with suppress(OSError), self._line.makefile(encoding="utf-8") as lines:
            for line in lines:
                self._orders.put(json.loads(line))
        self._orders.put(None)
        if self._at_work:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_OF_RANKS_TO_END)
        os._exit(128 + signal.SIGTERM)  # it waits for a rank that will not come, and hears no signal


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _speak_into(log: Path) -> None:
    """Let what this process says from now on go into a trial's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
