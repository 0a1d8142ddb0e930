"""SIGTERM and SIGINT while a training runs: remember them, finish the step, save; do not die half-way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

from cofitune.training.loop import STOP_SIGNALS

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None  # as signal.signal takes them


class StopRequest:
    """Within the context the first signal is remembered in `signum` (0: none came), if it `listens` at all.

    A second Ctrl-C ends the process at once, also in the middle of a collective. Under our launcher it arrives as a
    SIGTERM after the SIGINT. A second SIGTERM changes nothing: SLURM sends one to the launcher, which hands it on, and
    one to each rank.
    """

    def __init__(self, listens: bool = True) -> None:
        self.signum = 0
        self._signals = STOP_SIGNALS if listens else ()
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._remember) for s in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            ending = signum == signal.SIGTERM == self.signum  # a second SIGTERM must not interrupt what is left to do
            signal.signal(signum, (lambda *_: None) if ending else handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
