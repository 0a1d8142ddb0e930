"""From one process to ranks: torch's launcher on this machine, and what a rank finds in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
import warnings
from pathlib import Path

from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.files import write_text

USER_ERROR = 2
SECONDS_TO_END = 30  # for the trial of a search that is ended


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
        raise UserError(f"--num-processes {asked}: this machine has {devices} GPU{'s' if devices > 1 else ''}")
    return asked


def run_ranks(num_processes: int, arguments: list[str]) -> int:
    """Start `cofitune <arguments>` on every rank of this machine and wait.

    Returns:
        0, or the exit code of the first rank that failed (2 for a user's mistake, 128 + n for a signal).
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # its report of a failed rank repeats what the rank has said itself
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "cofitune", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        code = USER_ERROR if USER_ERROR in codes else codes[0]
        return 128 - code if code < 0 else code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def start_trial(config: Config, folder: Path, *, train: bool, num_processes: int) -> None:
    """Run one trial of a search in fresh processes, so that no trial depends on what ran before it.

    What the processes say goes into `<folder>/trial.log`.

    Raises:
        TrialError: a process failed; the message is the last thing that it said.
    """
    from cofitune.search.trial import TrialError

    path, log = folder / "trial.yaml", folder / "trial.log"
    write_text(path, dump_config(config))
    command = [sys.executable, "-m", "cofitune", "_trial", str(path), "--num-processes", str(num_processes)]
    with log.open("w", encoding="utf-8") as file:
        # inheritable files stay open in the trial: with them the search's lock, for as long as anyone writes
        process = subprocess.Popen(
            command + ([] if train else ["--no-train"]), stdout=file, stderr=subprocess.STDOUT, close_fds=False
        )
        try:
            code = process.wait()
        except BaseException:  # a signal ends the search, and with it its trial
            process.terminate()
            process.wait(SECONDS_TO_END)
            raise
    if code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise TrialError(f"{said[-1].strip() if said else 'no word'} (exit {code}; {log})")


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
