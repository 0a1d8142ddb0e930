"""The search in the terminal: the tree of trials with their scores against the base, the best path, and the winner.

Readable in 100 columns and without colour: marks and signs carry what colour only underlines. The tree keeps its 100
columns where the terminal, or a file, claims fewer: print it with `crop=False`, so that no score is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text
from rich.tree import Tree

from cofitune.model.layouts import GROUPS
from cofitune.model.region import Region

WIDTH = 100
LABEL = 42  # columns of the first cell, the tree's guides included
GUIDE = 4  # columns that rich's guides take a level
WON, ON_PATH = "★ ", "» "
LEGEND = f"{WON}winner   {ON_PATH}on the way to it   scores 0-100 (0: chance), with the change against the base"


@dataclass(frozen=True)
class Row:
    """One trial as the tree shows it: the base has no region, a failed trial has a reason and no scores.

    Attributes:
        num_trained: trained weights.
        speciality, versatility, unified: 0-100.
        seconds: wall time of training and evaluation.
    """

    id: str
    parent: str | None
    region: Region | None
    level: int
    num_trained: int
    speciality: float | None
    versatility: float | None
    unified: float | None
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class FullWidth:
    """Renders what it holds in `WIDTH` columns, whatever the console's width is."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.content, options.update(width=WIDTH))


@dataclass(frozen=True)
class PlanRow:
    """One level before the search: what it tries, and how many trials it starts (`exact`, or at most)."""

    title: str
    regions: tuple[Region, ...]
    trials: int
    exact: bool


def search_report(base: Row, rows: Sequence[Row], winner: str, runner_up: str | None = None) -> RenderableType:
    """The tree, its legend, and the winner with its reason and its runner-up.

    Args:
        base: the untouched model.
        rows: the trials in the order they were tried, parents before their children.
        winner: id of the winning trial.
        runner_up: id of the second best, if there is one.
    """
    return Group(
        search_tree(base, rows, winner),
        Text(LEGEND, style="dim"),
        Text(winner_sentence(base, rows, winner, runner_up)),
    )


def search_tree(base: Row, rows: Sequence[Row], winner: str) -> RenderableType:
    """The trials below the base, each under the one whose region it lies in."""
    by_id = {row.id: row for row in rows}
    path = _path(by_id, winner)
    header = "region (layers × modules)".ljust(LABEL) + _cells(
        "weights", "speciality", "versatility", "unified", "seconds"
    )
    tree = Tree(Text(_label("the base, nothing trained", 0) + _scores(base, None), no_wrap=True))
    nodes = {base.id: tree}
    for row in rows:
        mark = WON if row.id == winner else ON_PATH if row.id in path else ""
        above = nodes.get(row.parent or base.id, tree)
        depth = _depth(by_id, row)
        style = "bold" if mark else "dim" if row.reason else ""
        nodes[row.id] = above.add(Text(_line(row, base, mark, depth), style=style, no_wrap=True))
    return FullWidth(Group(Text(header, style="bold", no_wrap=True), tree))


def winner_sentence(base: Row, rows: Sequence[Row], winner: str, runner_up: str | None = None) -> str:
    """Who won and why, in one sentence, and who came second."""
    by_id = {row.id: row for row in rows}
    won = by_id[winner]
    gains = f"speciality {_change(won.speciality, base.speciality)}, versatility " + _change(
        won.versatility, base.versatility
    )
    text = (
        f"Winner: {region_text(won.region)}, with the highest unified score of {_count(rows)} "
        f"({_number(won.unified)}; against the base: {gains})"
    )
    second = by_id.get(runner_up or "")
    if second is None:
        text += "; there is no runner-up."
    else:
        tied = second.unified == won.unified
        lead = f", tied, but it trains {_tie(won, second)}" if tied else f" ({_number(second.unified)})"
        text += f"; runner-up: {region_text(second.region)}{lead}."
    if base.unified is not None and won.unified is not None and won.unified <= base.unified:
        text += f" No region beats the untouched base (unified {_number(base.unified)}) in this many steps."
    return text


def plan_report(rows: Sequence[PlanRow], train_steps: int, num_done: int = 0) -> RenderableType:
    """What a search would try, before anything runs.

    Args:
        rows: the levels, in order.
        train_steps: optimizer steps of each trial.
        num_done: trials that are finished already and will not be repeated.
    """
    total = sum(row.trials for row in rows)
    at_most = "" if all(row.exact for row in rows) else "at most "
    tree = Tree(f"{at_most}{_many(total, 'trial')} of {_many(train_steps, 'optimizer step')} each, and the base once")
    for number, row in enumerate(rows, start=1):
        count = _many(row.trials, "trial")
        if not row.exact:
            count = f"at most {count} of {_many(len(row.regions), 'region')}"
        level = tree.add(Text(f"level {number}: {row.title}  ({count})"))
        if row.exact:
            for region in row.regions:
                level.add(Text(region_text(region)))
    notes = [Text("A trial that fails is tried once more; its second try is not counted here.", style="dim")]
    if num_done:
        notes.append(Text(f"In the store already, and not to be repeated: {_many(num_done, 'trial')}."))
    return Group(tree, *notes)


def region_text(region: Region | None) -> str:
    """`8-15 × up+down`: a region in few columns; groups by their names."""
    if region is None:
        return "the base"
    for name, modules in GROUPS.items():
        if set(region.modules) == set(modules):
            return f"{region.layers_text} × {name}"
    return f"{region.layers_text} × {'+'.join(m.removesuffix('_proj') for m in region.modules)}"


def progress_line(row: Row, base: Row | None, number: int, at_most: int, known: bool) -> str:
    """One line as a trial ends: which it was, of how many at most, and what came out."""
    head = f"trial {number} of at most {max(at_most, number)}: {region_text(row.region)}: "
    if row.reason is not None:
        return head + f"failed: {row.reason}"
    change = f" ({_change(row.unified, base.unified)} against the base)" if base else ""
    return (
        head + f"unified {_number(row.unified)}{change}, {row.seconds:.0f} s" + (" (from the store)" if known else "")
    )


def _path(by_id: dict[str, Row], winner: str) -> set[str]:
    path: set[str] = set()
    here: str | None = winner
    while here in by_id and here not in path:
        path.add(here)
        here = by_id[here].parent
    return path


def _depth(by_id: dict[str, Row], row: Row) -> int:
    depth = 1
    while row.parent in by_id:
        row = by_id[row.parent]
        depth += 1
    return depth


def _line(row: Row, base: Row, mark: str, depth: int) -> str:
    label = _label(mark + region_text(row.region), depth)
    if row.reason is None:
        return label + _scores(row, base)
    room = WIDTH - LABEL - 2
    return f"{label}  {_cut('failed: ' + ' '.join(row.reason.split()), room)}"


def _label(text: str, depth: int) -> str:
    room = max(12, LABEL - GUIDE * depth)
    return _cut(text, room - 1).ljust(room)


def _scores(row: Row, base: Row | None) -> str:
    def score(name: str) -> str:
        now = getattr(row, name)
        return _number(now) + (f" {_change(now, getattr(base, name))}" if base else "")

    return _cells(
        "" if base is None else _weights(row.num_trained),
        score("speciality"),
        score("versatility"),
        score("unified"),
        f"{row.seconds:.0f}",
    )


def _weights(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"


def _cells(weights: str, speciality: str, versatility: str, unified: str, seconds: str) -> str:
    return f"{weights:>9}{speciality:>13}{versatility:>13}{unified:>13}{seconds:>9}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _change(now: float | None, before: float | None) -> str:
    return "-" if now is None or before is None else f"{now - before:+.1f}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _count(rows: Sequence[Row]) -> str:
    return _many(sum(row.reason is None for row in rows), "finished trial")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _tie(won: Row, second: Row) -> str:
    return "more weights" if second.num_trained > won.num_trained else "as many weights further up"
