"""A process that ends with the one that started it, also where that one is killed and can tell nobody."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_PID = "COFITUNE_PARENT_PID"  # set for a process that is to end with this one; it takes the variable out at once
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_END = 30  # after SIGTERM, where nothing else was granted


def with_parent(environment: dict[str, str]) -> dict[str, str]:
    """This environment, for a cofitune command that is to end with this process."""
    return environment | {PARENT_PID: str(os.getpid())}


def end_with_parent() -> None:
    """Watch the process that started this one, where it asked for that, and end when it is gone.

    SIGTERM first, under which a training saves its state; SIGKILL after the grace that ranks are granted.
    """
    parent = os.environ.pop(PARENT_PID, None)  # a process that this one starts has another parent
    if parent is None or not parent.isdecimal():
        return
    grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_END))

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch parent", daemon=True).start()
