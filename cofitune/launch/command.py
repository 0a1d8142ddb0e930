"""Other cofitune commands, run as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.errors import Stopped, UserError
from cofitune.files import write_text
from cofitune.launch.failures import NOT_MET, STOPPED, USER_ERROR
from cofitune.launch.launcher import Ranks
from cofitune.launch.parent import with_parent
from cofitune.ranks import VARIABLES

SECONDS_TO_END = 30  # for the proxy of a search that is ended
LINES_KEPT = 200  # of what a command says, for the message if it fails


def start_proxy(config: Config, path: Path, ranks: Ranks) -> None:
    """Take the gradient statistics of a search's proxy in processes of their own, whose memory is free afterwards.

    What they say goes into `<path>.log`.

    Args:
        path: where the statistics are to lie.
        ranks: on how many, and where: those of a trial.

    Raises:
        UserError: they failed; the message is the last thing that was said.
    """
    place, log = path.with_suffix(".yaml"), path.with_suffix(".log")
    write_text(place, dump_config(config))
    log.unlink(missing_ok=True)
    if failure := run_command(["_proxy", str(place), str(path)], log, ranks):
        raise UserError(f"search.proxy: {failure}")
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
    return _run([*arguments, *ranks.options], log, grace)


def run_aloud(arguments: Sequence[str], tell: Callable[[str], None], grace: int = SECONDS_TO_END) -> None:
    """Type a cofitune command in a fresh process, hand on each line that it says, and end as it ended.

    Args:
        tell: is given each line of its output.
        grace: as of `run_command`.

    Raises:
        UserError: a user error ended it.
        Stopped: a signal did.
        RuntimeError: a bug did; the message has its last lines.
    """
    process = _start(arguments, subprocess.PIPE)
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    with _ends_with_us(process, grace):
        for raw in process.stdout or ():
            lines.append(raw.decode("utf-8", errors="replace").rstrip("\n"))
            tell(lines[-1])
        code = process.wait()
    last = next((line for line in reversed(lines) if line.strip()), "no word")
    if code == USER_ERROR:
        first = max((n for n, line in enumerate(lines) if line.startswith("error: ")), default=0)
        raise UserError("\n".join(list(lines)[first:]).removeprefix("error: "))
    if code in STOPPED:
        raise Stopped(last, code - 128)
    if code not in (0, NOT_MET):
        raise RuntimeError(f"cofitune {arguments[0]} ended with exit code {code}:\n" + "\n".join(lines))


def _run(arguments: Sequence[str], log: Path, grace: int) -> str | None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        begins = file.tell()
        process = _start(arguments, file)
        with _ends_with_us(process, grace):
            code = process.wait()
    if not code:
        return None
    output = log.read_bytes()[begins:].decode("utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(output) if line.strip()), "no word")
    return f"{last} (exit {code}; {log})"


def _start(arguments: Sequence[str], output: IO[str] | int) -> subprocess.Popen[bytes]:
    # inheritable files stay open in the command: with them the caller's lock, for as long as anyone writes
    return subprocess.Popen(
        [sys.executable, "-m", "cofitune", *arguments],
        stdout=output,
        stderr=subprocess.STDOUT,
        close_fds=False,
        env=with_parent({name: value for name, value in os.environ.items() if name not in VARIABLES}),  # no rank
    )


@contextmanager
def _ends_with_us(process: subprocess.Popen[bytes], grace: int) -> Iterator[None]:
    """A signal that ends this process ends what it started, too."""
    try:
        yield
    except BaseException:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
