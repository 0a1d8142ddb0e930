"""From one process to ranks: torch's launcher on this machine, what ranks say when they fail, and a search's proxy."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING

from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.files import write_text
from cofitune.launch.hostfile import Host, Place, obey_the_line, read_hostfile, run_hosts
from cofitune.ranks import VARIABLES, is_launched, this_rank

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2
NOT_MET = 3  # a requirement of `cofitune eval --require`
PARENT = "COFITUNE_PARENT"  # set in ranks that `run_ranks` started: its machine's name where there are several
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}  # exit codes of a rank that a signal ended in good order
SECONDS_TO_END = 30  # for the proxy of a search that is ended


@dataclass(frozen=True)
class Ranks:
    """How many ranks to start, on this machine or, where there are `hosts`, on those.

    Attributes:
        options: the options of the command line that ask for the same.
    """

    count: int
    hosts: tuple[Host, ...]
    options: tuple[str, ...]

    def run(self, arguments: Sequence[str]) -> int:
        """Start `cofitune <arguments>` on every rank, wait, and return the exit code."""
        return run_hosts(self.hosts, arguments) if self.hosts else run_ranks(self.count, arguments)


def choose_ranks(num_processes: int | None, hostfile: Path | None) -> Ranks:
    """What `--num-processes` and `--hostfile` ask for.

    Raises:
        UserError: both are given, the hostfile is wrong, or there are fewer GPUs than ranks.
    """
    if hostfile is None:
        count = count_processes(num_processes)
        return Ranks(count, (), ("--num-processes", str(count)))
    if num_processes is not None:
        raise UserError("--num-processes and --hostfile: give one; the hostfile's slots are the ranks of each host")
    hosts = read_hostfile(hostfile)
    return Ranks(sum(host.slots for host in hosts), tuple(hosts), ("--hostfile", str(hostfile)))


def count_processes(asked: int | None) -> int:
    """How many ranks to start: what was asked for, else one a GPU, else one.

    Raises:
        UserError: more ranks than GPUs.
    """
    import torch

    devices = torch.cuda.device_count()
    if asked is None:
        return max(1, devices)
    if devices and asked > devices:
        raise UserError(
            f"{asked} ranks asked for: {socket.gethostname()} has {devices} GPU{'s' if devices > 1 else ''}"
        )
    return asked


def run_ranks(num_processes: int, arguments: Sequence[str], place: Place | None = None) -> int:
    """Start `cofitune <arguments>` on every rank of this machine and wait.

    Args:
        place: this machine among several, where there are several.

    Returns:
        0, or the exit code of the first rank that failed (2 for a user's mistake, 128 + n for a signal).

    Raises:
        UserError: another process has the port at which the ranks of several machines were to meet.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # its report of a failed rank is for programmers; `tell_failures` is ours
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ[PARENT] = socket.gethostname() if place else ""
    with TemporaryDirectory(prefix="cofitune-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=place.num_hosts if place else 1,
            max_nodes=place.num_hosts if place else 1,
            nproc_per_node=num_processes,
            run_id=place.run_id if place else uuid.uuid4().hex,
            rdzv_backend="static" if place else "c10d",  # static: host i holds the i-th ranks
            rdzv_endpoint=place.endpoint if place else "localhost:0",  # 0: a free port
            rdzv_configs={"rank": place.number} if place else {},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "cofitune", *arguments)
        except ChildFailedError as error:
            return tell_failures(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
        except DistNetworkError as error:
            raise UserError(f"the ranks cannot meet at {config.rdzv_endpoint}: {error}") from error
    return 0


def grant_grace(seconds: int) -> None:
    """Let ranks that will be started have this long to end by themselves after SIGTERM or SIGINT.

    By the environment: torch before 2.12 has no other way and waits 30 seconds (pytorch#172596).
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds))


def run_place(place: Place, arguments: Sequence[str]) -> int:
    """On one host of several: start its ranks and wait, obeying the one who started all."""
    obey_the_line()
    return run_ranks(count_processes(place.num_ranks), arguments, place)


def tell_failures(failures: Mapping[int, ProcessFailure]) -> int:
    """Say why ranks failed: once what several of them say, the first failure first. Returns the exit code."""
    codes = {failure.exitcode for failure in failures.values()}
    if codes & STOPPED and codes <= STOPPED | {-signal.SIGTERM}:  # the last to end may be told to while it ends
        return max(codes)  # rank 0 has said why
    began = min(failure.timestamp for failure in failures.values())
    own = {rank: f for rank, f in failures.items() if not _ended_by_another(f, began)} or failures
    mistakes = {rank: f for rank, f in own.items() if f.exitcode == USER_ERROR}
    first = sorted((mistakes or own).items(), key=lambda item: (item[1].timestamp, item[0]))
    told: dict[str, list[int]] = {}
    for rank, failure in first:
        told.setdefault(_words(failure), []).append(rank)
    for text, ranks in told.items():
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        where = f" on {os.environ[PARENT]}" if os.environ.get(PARENT) else ""
        lead = "" if mistakes and 0 in ranks else f"{who}{where}:" + ("\n" if "\n" in text else " ")
        print(f"{lead}{text}", file=sys.stderr)
    code = first[0][1].exitcode
    return 128 - code if code < 0 else code


def has_parent() -> bool:
    """Whether this process is a rank that `run_ranks` started, and that speaks for it when it fails."""
    return PARENT in os.environ and is_launched()


def tell_parent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A rank's `sys.excepthook`: leave the traceback, or a mistake's message, where torch's launcher picks it up."""
    text = (
        f"error: {error}" if isinstance(error, UserError) else "".join(traceback.format_exception(kind, error, trace))
    )
    about = {"py_callstack": text.rstrip(), "timestamp": str(int(time.time()))}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
        json.dumps({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": about}}), encoding="utf-8"
    )


def say_mistake(error: UserError) -> None:
    """Say a mistake of the user's, once.

    Ranks of ours leave it to their parent. Under torchrun and srun the first rank of each machine speaks, for the
    others there see what it sees; from the moment on that the ranks have met, a mistake may be one rank's own.
    """
    rank = this_rank()
    if has_parent():
        tell_parent(type(error), error, error.__traceback__)
    elif rank.rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif error.everywhere:
        return
    elif rank.local_rank == 0 or ("torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()):
        print(f"rank {rank.rank} on {socket.gethostname()}: error: {error}", file=sys.stderr)


def _ended_by_another(failure: ProcessFailure, began: int) -> bool:
    """Whether torch's launcher ended this rank, since another had failed: by SIGTERM, and 30 s later by SIGKILL."""
    if failure.exitcode == -signal.SIGKILL:
        return failure.timestamp > began + 1
    return failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)


def _words(failure: ProcessFailure) -> str:
    """A rank's traceback or mistake, or, where it left none, how it ended."""
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        return str(message["extraInfo"]["py_callstack"])
    if failure.exitcode == -signal.SIGKILL:
        return "was killed from outside, as the system does when the machine's memory is full"
    return f"ended without a word, {failure.signal_name() if failure.exitcode < 0 else f'exit code {failure.exitcode}'}"


def start_proxy(config: Config, path: Path) -> None:
    """Take the gradient statistics of a search's proxy in a process of its own, whose memory is free again afterwards.

    What the process says goes into `<path>.log`.

    Args:
        path: where the statistics are to lie.

    Raises:
        UserError: the process failed; the message is the last thing that it said.
    """
    place, log = path.with_suffix(".yaml"), path.with_suffix(".log")
    write_text(place, dump_config(config))
    command = [sys.executable, "-m", "cofitune", "_proxy", str(place), str(path)]
    with log.open("w", encoding="utf-8") as file:
        # inheritable files stay open in the process: with them the search's lock, for as long as anyone writes
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            close_fds=False,
            env={name: value for name, value in os.environ.items() if name not in VARIABLES},  # no rank
        )
        try:
            code = process.wait()
        except BaseException:  # a signal ends the search, and with it its process
            process.terminate()
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise UserError(f"search.proxy: {said[-1].strip() if said else 'no word'} (exit {code}; {log})")
    place.unlink()
    log.unlink()


def run_command(arguments: Sequence[str], log: Path, ranks: Ranks, grace: int = SECONDS_TO_END) -> str | None:
    """Type a cofitune command in fresh processes and wait; what it says is added to `log`.

    Args:
        ranks: on how many ranks it runs, and where.
        grace: seconds that it gets to end by itself where a signal ends this process.

    Returns:
        None, or why it failed: the last thing that it said, and its exit code.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        begins = file.tell()
        # inheritable files stay open in the command: with them the caller's lock, for as long as anyone writes
        process = subprocess.Popen(
            [sys.executable, "-m", "cofitune", *arguments, *ranks.options],
            stdout=file,
            stderr=subprocess.STDOUT,
            close_fds=False,
            env={name: value for name, value in os.environ.items() if name not in VARIABLES},  # no rank yet
        )
        try:
            code = process.wait()
        except BaseException:  # a signal ends this process, and with it what it started
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if not code:
        return None
    said = log.read_bytes()[begins:].decode("utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(said) if line.strip()), "no word")
    return f"{last} (exit {code}; {log})"


def quiet_libraries() -> None:
    """Silence what libraries say that a user cannot act on, and show them the way. Runs before they are imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns after every fork
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # tools of the environment, such as ninja, are found also where it was not activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    if this_rank().rank:  # rank 0 alone talks
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        os.environ.update(TQDM_DISABLE="1", TORCH_CPP_LOG_LEVEL="ERROR")
