"""A chat template is the model's and may do anything: loop for ever, or raise what it likes. Both end in a message."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jinja2 import TemplateError

from cofitune.errors import UserError

SECONDS = 10.0  # of CPU time for one conversation, which takes milliseconds


class _EndlessError(BaseException):
    """Passes handlers of ordinary errors."""


def guarded(render: Callable[[], object]) -> str:
    """Render a conversation.

    Raises:
        TemplateError: the template raises, whatever it is.
        UserError: it does not come to an end.
    """
    try:
        with _limited():
            return str(render())
    except _EndlessError:
        raise UserError(
            f"data.template: the chat template has not rendered one conversation in {SECONDS:g} seconds: does it loop? "
            "plain, or a file with another template, can stand in for it"
        ) from None
    except TemplateError:
        raise
    except Exception as error:  # a template calls what it likes, with what it likes
        raise TemplateError(f"it raises {type(error).__name__}: {error}") from error


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `_EndlessError` inside after too much CPU time; only the main thread can be reached so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise _EndlessError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
