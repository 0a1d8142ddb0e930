"""Signals while a training runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cofitune.training.signals import StopRequest


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """The SIGTERMs that reach the handler around the training."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: got.append(signum))
    yield got
    signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_does_not_interrupt_the_end(terminated: list[int]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == signal.SIGTERM and terminated == []


def test_without_a_signal_the_handler_from_before_is_back(terminated: list[int]) -> None:
    with StopRequest() as stop:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == 0 and terminated == [signal.SIGTERM]


BUSY = """
import hashlib
from cofitune.training.signals import StopRequest

with StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python runs no handler
"""


@pytest.mark.parametrize(
    ("signals", "ends"),
    [
        ((signal.SIGINT, signal.SIGINT), True),
        ((signal.SIGINT, signal.SIGTERM), True),  # as our launcher hands a second Ctrl-C on
        ((signal.SIGTERM, signal.SIGINT), True),
        ((signal.SIGTERM, signal.SIGTERM), False),
    ],
)
@pytest.mark.processes
def test_a_second_interrupt_ends_a_call_that_hangs(signals: tuple[signal.Signals, ...], ends: bool) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for signum in signals:
            process.send_signal(signum)
            time.sleep(0.2)
        if ends:
            assert process.wait(timeout=60) == 130
        else:
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


FORKED = """
import os, signal, time
from cofitune.training.signals import StopRequest

with StopRequest() as stop:
    child = os.fork()
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal interrupts both
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.5)
print(stop.signum)
"""


@pytest.mark.processes
def test_one_interrupt_of_a_parent_and_its_child_is_not_a_second() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
