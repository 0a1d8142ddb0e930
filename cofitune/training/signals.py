"""SIGTERM and SIGINT while a training runs: remember them, finish the step, save; do not die half-way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from cofitune.training.loop import STOP_SIGNALS

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None  # as signal.signal takes them
_listening: set[int] = set()  # the pipes that signals are written to now


class StopRequest:
    """Within the context the first signal is remembered in `signum` (0: none came), if it `listens` at all.

    A second Ctrl-C ends the process at once with exit code 130, also in the middle of a collective that hangs: a thread
    counts the signals, since Python runs no handler before the main thread is back from such a call. Under our launcher
    the second one arrives as a SIGTERM after the SIGINT. A second SIGTERM changes nothing: SLURM sends one to the
    launcher, which hands it on, and one to each rank.
    """

    def __init__(self, listens: bool = True) -> None:
        self.signum = 0
        self._signals = STOP_SIGNALS if listens else ()
        self._before: dict[signal.Signals, Handler] = {}
        self._wakeup_before = self._writer = -1

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._remember) for s in self._signals}
        if self._signals:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)  # as set_wakeup_fd wants it
            _listening.add(self._writer)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=_exit_on_second_signal, args=[reader], name="second Ctrl-C", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            ending = signum == signal.SIGTERM == self.signum  # a second SIGTERM must not interrupt what is left to do
            signal.signal(signum, (lambda *_: None) if ending else handler)
        if self._signals:
            signal.set_wakeup_fd(self._wakeup_before)
            _listening.remove(self._writer)
            os.close(self._writer)  # which ends the thread

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum


def _ignore_in_child() -> None:
    """A forked child hears the same Ctrl-C, and must not count it a second time in its parent's pipe."""
    if _listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_ignore_in_child)


def _exit_on_second_signal(reader: int) -> None:
    """End this process at a second signal, where one of the two is a SIGINT. Python writes a byte for each signal."""
    first = 0
    with os.fdopen(reader, "rb", buffering=0) as signals:
        while byte := signals.read(1):
            if byte[0] not in STOP_SIGNALS:
                continue
            if first and signal.SIGINT in (first, byte[0]):
                os._exit(128 + signal.SIGINT)
            first = first or byte[0]
