"""Answers on the terminal while they are written: side by side where there is room, else one below the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from cofitune.reports.console import say

LEAST_WIDTH = 100  # columns of the terminal, for two answers side by side
CUT = " […]"  # behind an answer that `max_new_tokens` ended


class AnswerStream(TextStreamer):
    """Hands over the text of an answer, word by word; tokens that end an answer are not shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._tell = set(ends), tell

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is skipped, or the next token."""
        if self.next_tokens_are_prompt or int(value[-1]) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand over what cannot change any more."""
        if text:
            self._tell(text)


class Screen:
    """Where one turn's answers appear. Used as a context; this one shows nothing."""

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def stream(self, name: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> TextStreamer | None:
        """What is told of this speaker's tokens; None where nobody watches."""
        return None

    def finish(self, name: str, answer: str, cut: bool) -> None:
        """Show the whole answer; `cut`: it was not ended by the model."""


class LinesScreen(Screen):
    """One answer below the other, each under its speaker's name where there are several."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console, self._names = console, names
        self._began = False

    def stream(self, name: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> TextStreamer | None:
        """Print words as they come on a terminal; elsewhere the answer comes at once."""
        if len(self._names) > 1:
            say(self._console, f"[{name}]", style="bold")
        self._began = False
        return AnswerStream(tokenizer, ends, self._tell) if self._console.is_terminal else None

    def _tell(self, text: str) -> None:
        text = text if self._began else text.lstrip()
        self._began = self._began or bool(text)
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def finish(self, name: str, answer: str, cut: bool) -> None:
        """End the line, or print all of it."""
        say(self._console, ("" if self._console.is_terminal else answer) + (CUT if cut else ""))


class ColumnsScreen(Screen):
    """A column a speaker, filled one after the other."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._texts = dict.fromkeys(names, "")
        # what is higher than the terminal is shown whole when the turn ends
        self._live = Live(self._table(), console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Screen:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.vertical_overflow = "visible"
        self._live.__exit__(kind, error, trace)

    def stream(self, name: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> TextStreamer | None:
        """Fill this speaker's column."""

        def tell(text: str) -> None:
            self._show(name, self._texts[name] + text)

        return AnswerStream(tokenizer, ends, tell)

    def finish(self, name: str, answer: str, cut: bool) -> None:
        """Show the whole answer."""
        self._show(name, answer + (CUT if cut else ""))

    def _show(self, name: str, text: str) -> None:
        self._texts[name] = text.lstrip()
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for _ in self._texts:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Rule(name, align="left") for name in self._texts))
        table.add_row(*map(Text, self._texts.values()))
        return table


def open_screen(console: Console, names: Sequence[str]) -> Screen:
    """The screen that fits: columns on a terminal that is wide enough, else lines; nothing where nobody is to hear."""
    if console.quiet:
        return Screen()
    wide = console.is_terminal and len(names) > 1 and console.width >= LEAST_WIDTH
    return ColumnsScreen(console, names) if wide else LinesScreen(console, names)
