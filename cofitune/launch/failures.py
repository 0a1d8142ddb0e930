"""How a rank tells why it ended, and what its parent makes of it: one message and one exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cofitune.errors import UserError
from cofitune.ranks import is_launched, this_rank

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2
NOT_MET = 3  # a requirement of `cofitune eval --require`
PARENT = "COFITUNE_PARENT"  # set in ranks that `run_ranks` started: its machine's name where there are several
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}  # exit codes of a rank that a signal ended in good order


def tell_failures(failures: Mapping[int, ProcessFailure]) -> int:
    """Say why ranks failed: once what several of them say, the first failure first. Returns the exit code."""
    codes = {failure.exitcode for failure in failures.values()}
    if codes & STOPPED and codes <= STOPPED | {-signal.SIGTERM}:  # the last to end may be told to while it ends
        return max(codes)  # rank 0 has said why
    began = min(failure.timestamp for failure in failures.values())
    own = {rank: f for rank, f in failures.items() if not _ended_by_another(f, began)} or failures
    mistakes = {rank: f for rank, f in own.items() if f.exitcode == USER_ERROR}
    first = sorted((mistakes or own).items(), key=lambda item: (item[1].timestamp, item[0]))
    messages: dict[str, list[int]] = {}
    for rank, failure in first:
        messages.setdefault(_words(failure), []).append(rank)
    for text, ranks in messages.items():
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        where = f" on {os.environ[PARENT]}" if os.environ.get(PARENT) else ""
        lead = "" if mistakes and 0 in ranks else f"{who}{where}:" + ("\n" if "\n" in text else " ")
        print(f"{lead}{text}", file=sys.stderr)
    code = first[0][1].exitcode
    return 128 - code if code < 0 else code


def launched_by_us() -> bool:
    """Whether this process is a rank that `run_ranks` started, and that speaks for it when it fails."""
    return PARENT in os.environ and is_launched()


def tell_parent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A rank's `sys.excepthook`: leave the traceback, or a mistake's message, where torch's launcher picks it up."""
    text = (
        f"error: {error}" if isinstance(error, UserError) else "".join(traceback.format_exception(kind, error, trace))
    )
    about = {"py_callstack": text.rstrip(), "timestamp": str(int(time.time()))}
    with suppress(OSError):  # a killed parent's folder may be gone, and the disk full
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
            json.dumps({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": about}}), encoding="utf-8"
        )


def say_mistake(error: UserError) -> None:
    """Say a mistake of the user's, once.

    Ranks of ours leave it to their parent. Under torchrun and srun the first rank of each machine speaks, for the
    others there see what it sees; from the moment on that the ranks have met, a mistake may be one rank's own.
    """
    rank = this_rank()
    if launched_by_us():
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
