"""A forked helper that must not outlive the process that forked it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def end_with_parent(parent: int | None = None) -> None:
    """Ask the system for this process' end when its parent ends, also where that one is killed. Linux alone can.

    Args:
        parent: the parent's pid, where it may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
