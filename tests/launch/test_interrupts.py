"""A signal handler that raises leaves no lock of `Popen`'s behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest

from cofitune.launch import interrupts
from cofitune.launch.interrupts import (
    Handler,
    callers_handlers_outside_popen,
    outside_popen,
    raise_on_signals,
    termination_signals,
)


class Signalled(Exception):
    """What the handler raises."""


class SignalledWhileTaken:
    """A lock that is met by a signal right after it was taken for the first time."""

    def __init__(self) -> None:
        self._lock, self._left = threading.Lock(), 1

    def acquire(self, blocking: bool = True) -> bool:
        taken = self._lock.acquire(blocking)
        if taken and self._left:
            self._left = 0
            signal.raise_signal(signal.SIGUSR1)  # its handler runs before this returns
        return taken

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that reads, and whose lock is met by a signal."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process._waitpid_lock = SignalledWhileTaken()  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGUSR1)
    yield process
    signal.signal(signal.SIGUSR1, before)
    process._waitpid_lock = threading.Lock()  # type: ignore[attr-defined]
    process.kill()
    process.communicate()


def handle(signum: int, _: object) -> None:
    raise Signalled


def wait(process: subprocess.Popen[bytes]) -> None:
    process.wait(60)


def look(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        time.sleep(0.01)


@pytest.mark.processes
@pytest.mark.parametrize("meet", [wait, look])
@pytest.mark.parametrize(("handler", "left"), [(handle, True), (outside_popen(handle), False)])
def test_popen_gives_its_lock_back(
    meet: Callable[[subprocess.Popen[bytes]], None], handler: Handler, left: bool, child: subprocess.Popen[bytes]
) -> None:
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(Signalled):
        meet(child)
    assert child._waitpid_lock.locked() is left  # type: ignore[attr-defined]
    if not left:
        child.communicate(b"\n", timeout=60)
        assert child.returncode == 0


def test_within_it_a_signal_raises_and_the_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in termination_signals()}
    with pytest.raises(RuntimeError, match="SIGTERM"), raise_on_signals(lambda signum: RuntimeError(signum.name)):
        signal.raise_signal(signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.processes
@pytest.mark.parametrize("from_python", [True, False])
def test_a_callers_handler_gives_popens_lock_back(
    from_python: bool, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a notebook that calls `cofitune.train`."""
    monkeypatch.setattr(interrupts, "ALWAYS", (signal.SIGUSR1,))
    signal.signal(signal.SIGUSR1, handle)
    with pytest.raises(Signalled), callers_handlers_outside_popen() if from_python else nullcontext():
        wait(child)
    assert child._waitpid_lock.locked() is not from_python  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGUSR1) is handle


def test_what_nohup_has_ignored_stays_ignored() -> None:
    """Under torch's own handlers the end of a terminal ends a launcher that `nohup` started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_signals(lambda signum: RuntimeError(signum.name)):
            signal.raise_signal(signal.SIGHUP)
            assert signal.SIGINT in termination_signals() and signal.SIGHUP not in termination_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
