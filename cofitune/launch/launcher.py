"""From one process to ranks: torch's launcher on this machine, what ranks say when they fail, and a search's proxy."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cofitune.errors import UserError
from cofitune.launch.failures import PARENT, tell_failures
from cofitune.launch.hostfile import Host, Place, follow_parent_signals, read_hostfile, run_hosts
from cofitune.launch.interrupts import raise_on_signals
from cofitune.launch.parent import PARENT_PID
from cofitune.ranks import is_launched, this_rank
from cofitune.temporary import temporary_folder


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


ONE_PROCESS = Ranks(1, (), ("--num-processes", "1"))


def asks_for_ranks(num_processes: int | None, hostfile: Path | None) -> bool:
    """Whether several ranks were asked for by name; where nothing is said there is one for each GPU."""
    return hostfile is not None or (num_processes or 1) > 1


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
    os.environ[PARENT_PID] = str(os.getpid())
    with temporary_folder("cofitune-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=place.num_hosts if place else 1,
            max_nodes=place.num_hosts if place else 1,
            nproc_per_node=num_processes,
            run_id=place.run_id if place else uuid.uuid4().hex,
            rdzv_backend="static" if place else "c10d",  # static: host i holds the i-th ranks
            rdzv_endpoint=place.endpoint if place else "localhost:0",  # 0: a free port
            rdzv_configs={"rank": place.number} if place else {},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
            signals_to_handle="",  # it would raise also where `Popen` cannot bear that
        )
        try:
            with raise_on_signals(lambda signum: SignalException(f"got {signum.name}", signum)):
                elastic_launch(config, sys.executable)("-m", "cofitune", *arguments)
        except ChildFailedError as error:
            return tell_failures(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
        except DistNetworkError as error:
            raise UserError(f"the ranks cannot meet at {config.rdzv_endpoint}: {error}") from error
    return 0


def launch_ranks_if_needed(
    num_processes: int | None, hostfile: Path | None, dry_run: bool, check: Callable[[int], object]
) -> bool:
    """Where several ranks are called for and this process is none yet: start them, and say that the work is done.

    `check` (given the number of ranks) finds the user's mistakes here first, where there is one process to say them. A
    failure ends this process with the ranks' exit code; a rank has said why.
    """
    if is_launched() or dry_run:
        return False
    ranks = choose_ranks(num_processes, hostfile)
    if ranks.count == 1 and not ranks.hosts:
        return False
    check(ranks.count)
    code = ranks.run(sys.argv[1:])
    if code:
        raise SystemExit(code)
    return True


def require_single_process(command: str) -> None:
    """Refuse to be one of several ranks."""
    if this_rank().world_size > 1:
        raise UserError(
            f"cofitune {command} is one process and starts ranks by itself where it needs them: type it without "
            "torchrun, and in a SLURM job without srun (or as one task of it)"
        )


def grant_grace(seconds: int) -> None:
    """Let ranks that will be started have this long to end by themselves after SIGTERM or SIGINT.

    By the environment: torch before 2.12 has no other way and waits 30 seconds (pytorch#172596).
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds))


def run_place(place: Place, arguments: Sequence[str]) -> int:
    """On one host of several: start its ranks and wait, obeying the one who started all."""
    follow_parent_signals()
    return run_ranks(count_processes(place.num_ranks), arguments, place)


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
