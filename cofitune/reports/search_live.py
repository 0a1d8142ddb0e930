"""A search while it runs: on a terminal the tree so far, what runs and the time left; in a log one line a trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from cofitune.reports.progress import clock
from cofitune.reports.search_tree import Row, path_to, progress_line, region_text, tree_heading, tree_line

REFRESHES_A_SECOND = 2
OTHER_LINES = 4  # of the terminal's, besides the trials': account, heading, base, and a spare one


class SearchLive:
    """A context manager around a search's trials.

    Call `on_base` when the base is scored, `on_start` with the trials that are ordered together, and `on_outcome` as
    each ends. The tree is gone in the end, for the recipe prints the whole one; that of an interrupted search stays.
    """

    def __init__(
        self, console: Console, at_most: int, at_once: int | None = 1, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Count up to `at_most` trials, the base not counted; `at_once` of them run at a time, None: nobody knows."""
        self._console, self._at_most, self._at_once, self._now = console, at_most, at_once, now
        self._base: Row | None = None
        self._best: str | None = None
        self._rows: dict[str, Row] = {}  # all that were ordered or ended, in the order in which they came
        self._began: dict[str, float | None] = {}  # those that have not ended; None: it waits
        self._ended: dict[str, float] = {}  # seconds
        self._first = now()
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=REFRESHES_A_SECOND, transient=True
        )

    def __enter__(self) -> SearchLive:
        if self._console.is_terminal and not self._console.quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.transient = kind is None
        self._live.stop()

    def on_base(self, base: Row) -> None:
        """The base is scored, and all that follow are shown against it."""
        self._base = base

    def on_start(self, rows: Sequence[Row]) -> None:
        """These are ordered, in this order; they have no scores yet."""
        for row in rows:
            self._rows[row.id] = row
            self._began[row.id] = None
        self._let_begin()

    def on_outcome(self, row: Row, known: bool = False, best: str | None = None) -> None:
        """One has ended, or was known from the store; `best` is the best one's id so far."""
        self._rows[row.id] = row
        self._began.pop(row.id, None)
        self._ended[row.id] = row.seconds
        self._best = best or self._best
        self._let_begin()
        if not self._console.is_terminal:
            line = progress_line(row, self._base, len(self._ended), self._at_most, known)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """By the mean of the trials that have ended, and what is still to come; None before the first has."""
        if not self._ended:
            return None
        spent = list(self._ended.values())
        mean = sum(spent) / len(spent)
        to_come = max(len(self._began), self._at_most - len(self._ended))
        under_way = [min(mean, self._now() - began) for began in self._began.values() if began is not None]
        at_once = self._at_once
        if at_once is None:  # as many as there must have been
            at_once = max(1, round(sum(spent) / max(1.0, self._now() - self._first)))
            under_way = []  # or waiting
        return (mean * to_come - sum(under_way)) / at_once

    def render(self) -> RenderableType:
        """The account, then the tree, cut to what the terminal can hold."""
        lines: list[RenderableType] = [Text(self._account(), no_wrap=True, style="bold")]
        if self._base is not None:
            lines += [Text(tree_heading(), style="dim", no_wrap=True), self._tree(self._base)]
        return Group(*lines)

    def _let_begin(self) -> None:
        """Of those that wait, as many as run at once begin."""
        room = len(self._began) if self._at_once is None else self._at_once
        for name in list(self._began)[:room]:
            if self._began[name] is None:
                self._began[name] = self._now()

    def _account(self) -> str:
        ended = len(self._ended)
        text = f"{ended} of at most {max(self._at_most, ended)} trials"
        if not self._base:
            return f"{text}; scoring the base, which trains nothing"
        best = self._rows.get(self._best or "")
        if best is not None and best.unified is not None:
            text += f"; best so far {region_text(best.region)} ({best.unified:.1f})"
        left = self.seconds_left()
        return text if left is None else f"{text}; at most {clock(left)} left"

    def _tree(self, base: Row) -> RenderableType:
        shown = self._choose(self._console.height - OTHER_LINES)
        way = path_to(self._rows, self._best)
        root = Tree(Text(tree_line(base, None, depth=0), no_wrap=True))
        nodes = {base.id: root}
        for row in shown:
            depth = len(path_to(self._rows, row.id))
            if row.id in self._began:
                text = Text(tree_line(row, base, depth=depth, instead=self._stage(row.id)), style="cyan", no_wrap=True)
            else:
                mark = "best" if row.id == self._best else "way" if row.id in way else ""
                style = "bold" if mark else "dim" if row.reason else ""
                text = Text(tree_line(row, base, depth=depth, mark=mark), style=style, no_wrap=True)
            nodes[row.id] = nodes.get(row.parent or base.id, root).add(text)
        hidden = len(self._rows) - len(shown)
        return Group(root, Text(f"… and {hidden} more trials", style="dim")) if hidden else root

    def _choose(self, room: int) -> list[Row]:
        """What fits: the way to the best first, then what runs, then what came last; each with its parents."""
        if len(self._rows) <= room:
            return list(self._rows.values())
        running = [name for name, began in self._began.items() if began is not None]
        wanted: set[str] = set()
        for name in [*([self._best] if self._best else []), *running, *reversed(self._rows)]:
            more = wanted | set(path_to(self._rows, name))
            if len(more) < room:
                wanted = more
        return [row for row in self._rows.values() if row.id in wanted]

    def _stage(self, name: str) -> str:
        began = self._began[name]
        if began is None:
            return "waits"
        return "runs or waits" if self._at_once is None else f"runs, {clock(self._now() - began)}"
