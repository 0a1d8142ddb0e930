"""A search while it runs, on a terminal: the tree so far, what runs and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from cofitune.reports.console import say
from cofitune.reports.search.row import SCORES, Row
from cofitune.reports.search.tree import (
    LABEL,
    WIDTH,
    path_to,
    progress_line,
    tree_heading,
    tree_line,
)
from cofitune.reports.text import clock, region_text

REFRESHES_A_SECOND = 2
OTHER_LINES = 4  # of the terminal's, besides the trials': account, heading, base, and a spare one


class SearchLive:
    """A context manager around a search's trials.

    Call `on_base` when the base is scored, `on_level` as a level begins, `on_start` with the trials that are ordered
    together, and `on_outcome` as each ends. The tree is gone in the end, for the recipe prints the whole one; that of
    an interrupted search stays.
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
        self._paused: dict[str, float] = {}  # likewise
        self._seconds_here = 0.0  # of trials in this call
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

    def on_level(self, at_most: int) -> None:
        """A level begins: by what is known now, the search comes to so many trials."""
        self._at_most = at_most

    def on_start(self, rows: Sequence[Row]) -> None:
        """These are ordered, in this order; they have no scores yet."""
        for row in rows:
            self._rows.setdefault(row.id, row)  # one that continues keeps what is known of it
            self._began[row.id] = None
            self._ended.pop(row.id, None)  # it failed, and is tried once more
        self._let_begin()

    def on_outcome(self, row: Row, known: bool = False, best: str | None = None) -> None:
        """One has ended or paused, or the store knew it; `best` is the best one's id so far."""
        before = self._rows.get(row.id)
        self._seconds_here += 0.0 if known else row.seconds - (before.seconds if before else 0.0)
        self._rows[row.id] = row
        self._began.pop(row.id, None)
        spent = self._paused if row.status == "paused" else self._ended
        self._paused.pop(row.id, None)
        spent[row.id] = row.seconds
        self._best = best or self._best
        self._let_begin()

    def seconds_left(self) -> float | None:
        """By the mean of the whole trials so far, and what is still to come; None before the first has ended."""
        whole = [self._ended[name] for name in self._ended if self._rows[name].finished]
        if not whole:
            return None
        mean = sum(whole) / len(whole)
        planned_runs = max(len(self._began.keys() | self._paused.keys()), self._at_most - len(self._ended))
        spent = dict(self._paused)
        for name, began in self._began.items():
            if began is not None and self._at_once is not None:  # else it may wait
                spent[name] = spent.get(name, 0.0) + self._now() - began
        at_once = self._at_once or self._at_once_so_far()
        return (mean * planned_runs - sum(min(mean, seconds) for seconds in spent.values())) / at_once

    def _at_once_so_far(self) -> int:
        """How many trials must have run at a time, by what all took and by the clock."""
        return max(1, round(self._seconds_here / max(1.0, self._now() - self._first)))

    def render(self) -> RenderableType:
        """The account, then the tree, cut to what the terminal can hold."""
        lines: list[RenderableType] = [Text(self._account(), no_wrap=True, style="bold")]
        if self._base is not None:
            scale = self._base.scale
            brief = "unified" if scale is SCORES else "speciality loss, drift (nats a token, lower is better)"
            heading = f"{'region (layers × modules)':{LABEL}}  {brief}" if self._narrow else tree_heading(scale)
            lines += [Text(heading, style="dim", no_wrap=True), self._tree(self._base)]
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
        best = self._rows.get(self._best or "")
        if best is not None:
            brief = SCORES.number(best.unified) if best.scale is SCORES else best.scale.brief(best, None)
            text += f"; best so far {region_text(best.region)} ({brief})"
        left = self.seconds_left()
        return text if left is None else f"{text}; at most {clock(left)} left"

    def _tree(self, base: Row) -> RenderableType:
        shown = self._choose(self._console.height - OTHER_LINES)
        way = path_to(self._rows, self._best)
        root = Tree(Text(tree_line(base, None, depth=0, instead=self._score(base, None)), no_wrap=True))
        nodes = {base.id: root}
        for row in shown:
            depth = len(path_to(self._rows, row.id))
            if row.id in self._began:
                text = Text(tree_line(row, base, depth=depth, instead=self._stage(row.id)), style="cyan", no_wrap=True)
            else:
                mark = "best" if row.id == self._best else "way" if row.id in way else ""
                style = "bold" if mark else "" if row.finished else "dim"
                score = self._score(row, base) if row.finished else None
                text = Text(tree_line(row, base, depth=depth, mark=mark, instead=score), style=style, no_wrap=True)
            nodes[row.id] = nodes.get(row.parent or base.id, root).add(text)
        hidden = len(self._rows) - len(shown)
        return Group(root, Text(f"… and {hidden} more trials", style="dim")) if hidden else root

    @property
    def _narrow(self) -> bool:
        """Whether the terminal has no room for all columns: then the one that decides stands alone."""
        return self._console.width < WIDTH

    def _score(self, row: Row, base: Row | None) -> str | None:
        """What stands in the place of all scores, where there is no room for them."""
        if not self._narrow:
            return None
        return row.scale.brief(row, base)

    def _choose(self, room: int) -> list[Row]:
        """What fits: the way to the best first, then what runs, then what came last; each with its parents."""
        if len(self._rows) <= room:
            return list(self._rows.values())
        running = [name for name, began in self._began.items() if began is not None]
        requested: set[str] = set()
        for name in [*([self._best] if self._best else []), *running, *reversed(self._rows)]:
            more = requested | set(path_to(self._rows, name))
            if len(more) < room:
                requested = more
        return [row for row in self._rows.values() if row.id in requested]

    def _stage(self, name: str) -> str:
        began = self._began[name]
        if began is None:
            return "waits"
        return "runs or waits" if self._at_once is None else f"runs, {clock(self._now() - began)}"


class Watcher(Protocol):
    """Who is told how a search gets on."""

    def on_base(self, base: Row) -> None:
        """The base is scored, and all that follow are shown against it."""

    def on_level(self, at_most: int) -> None:
        """A level begins: by what is known now, the search comes to so many trials."""

    def on_start(self, rows: Sequence[Row]) -> None:
        """These are ordered, in this order; they have no scores yet."""

    def on_outcome(self, row: Row, known: bool = False, best: str | None = None) -> None:
        """A trial was scored, failed or was stopped, or the store knew it; `best` is the best one's id so far."""


class Lines:
    """A line a trial."""

    def __init__(self, console: Console, at_most: int) -> None:
        self._console, self._at_most = console, at_most
        self._base: Row | None = None
        self._ended: set[str] = set()

    def on_base(self, base: Row) -> None:
        """As `Watcher` says."""
        self._base = base

    def on_level(self, at_most: int) -> None:
        """As `Watcher` says."""
        self._at_most = at_most

    def on_start(self, rows: Sequence[Row]) -> None:
        """Nothing is said before a trial ends."""

    def on_outcome(self, row: Row, known: bool = False, best: str | None = None) -> None:
        """As `Watcher` says."""
        self._ended.add(row.id)
        line = progress_line(row, self._base, len(self._ended), self._at_most, known)
        say(self._console, line)
