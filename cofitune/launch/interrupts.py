"""Signal handlers that raise, kept away from the one place where `subprocess.Popen` must not be interrupted.

`Popen` takes a lock before it looks whether its child has ended. An exception between taking it and the `try` that
releases it leaves the lock taken: every later look says that the child is running. torch's launcher, whose handler
raises, then waited for ranks that had long ended, for twice `train.stop_grace_seconds`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
SECONDS_LATER = 0.002  # a look at a child takes microseconds
FRAMES = 6  # that may stand above Popen's own while it holds its lock
ALWAYS = (signal.SIGTERM, signal.SIGINT)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT)  # `nohup` has a process ignore SIGHUP


def outside_popen(handler: Handler) -> Handler:
    """Wrap a handler that may raise: while `Popen` holds its lock, the signal is sent again a moment later instead."""

    def handle(signum: int, frame: FrameType | None) -> object:
        if not _popen_holds_its_lock(frame):
            return handler(signum, frame)
        threading.Timer(SECONDS_LATER, os.kill, (os.getpid(), signum)).start()
        return None

    return handle


@contextmanager
def callers_handlers_outside_popen() -> Iterator[None]:
    """Within the context the caller's signal handlers, Python's own for Ctrl-C among them, do not interrupt `Popen`.

    Does nothing in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in termination_signals() if callable(handler := signal.getsignal(number))}
    for number, handler in before.items():
        signal.signal(number, outside_popen(handler))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def termination_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to end, without those that it was started to ignore."""
    return (*ALWAYS, *(s for s in UNLESS_IGNORED if signal.getsignal(s) is not signal.SIG_IGN))


@contextmanager
def raise_on_signals(error: Callable[[signal.Signals], BaseException]) -> Iterator[None]:
    """Within the context a termination signal raises an error. Does nothing in other threads than the main one."""

    def handle(signum: int, _frame: FrameType | None) -> None:
        raise error(signal.Signals(signum))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, outside_popen(handle)) for number in termination_signals()}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def _popen_holds_its_lock(frame: FrameType | None) -> bool:
    """Whether the code that a signal interrupted is `Popen` at work under its lock."""
    for _ in range(FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_filename == subprocess.__file__:
            process = frame.f_locals.get("self")
            if isinstance(process, subprocess.Popen):
                lock = getattr(process, "_waitpid_lock", None)
                return lock is not None and lock.locked()
        frame = frame.f_back
    return False
