"""Signals while a training runs."""

from __future__ import annotations

import os
import signal
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
