"""A cofitune command, typed as a user would, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time


def cofitune(*words: object) -> float:
    """Type a cofitune command, which skips what an earlier call has done; give its seconds.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "cofitune", *map(str, words)]
    print("$", *command[2:], flush=True)
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return round(time.perf_counter() - started, 1)
