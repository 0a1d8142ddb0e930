"""Other cofitune commands, run as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.files import write_text
from cofitune.launch.launcher import Ranks
from cofitune.launch.parent import with_parent
from cofitune.ranks import VARIABLES

SECONDS_TO_END = 30  # for the proxy of a search that is ended


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
    log.unlink(missing_ok=True)
    if failure := _run(["_proxy", str(place), str(path)], log, SECONDS_TO_END):
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


def _run(arguments: Sequence[str], log: Path, grace: int) -> str | None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        begins = file.tell()
        # inheritable files stay open in the command: with them the caller's lock, for as long as anyone writes
        process = subprocess.Popen(
            [sys.executable, "-m", "cofitune", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            close_fds=False,
            env=with_parent({name: value for name, value in os.environ.items() if name not in VARIABLES}),  # no rank
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
    output = log.read_bytes()[begins:].decode("utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(output) if line.strip()), "no word")
    return f"{last} (exit {code}; {log})"
