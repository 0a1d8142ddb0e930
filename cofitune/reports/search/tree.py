"""The search in the terminal: the tree of trials with their scores against the base, the best path, and the winner.

Readable in 100 columns and without colour: marks and signs carry what colour only underlines. The tree keeps its 100
columns where the terminal, or a file, claims fewer: print it with `crop=False`, so that no score is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text
from rich.tree import Tree

from cofitune.model.region import Region
from cofitune.reports.search.row import SCORES, Row, Scale
from cofitune.reports.text import _cut, many, region_text, weights_text

WIDTH = 100
LABEL = 42  # columns of the first cell, the tree's guides included
GUIDE = 4  # columns that rich's guides take a level
WON, ON_PATH = "★ ", "» "
TIED = "≈ "
LEGEND = f"{WON}winner   {ON_PATH}on the way to it   {TIED}ties with it   "
MARKS = {"won": WON, "best": WON, "way": ON_PATH}


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


def search_report(base: Row, rows: Sequence[Row], winner: str, sentences: Sequence[str] = ()) -> RenderableType:
    """The tree, its legend, and what is to be said of it.

    Args:
        base: the untouched model.
        rows: the trials in the order they were tried, parents before their children.
        winner: id of the winning trial.
        sentences: the winner with its reason, and what else there is to know (sentences.py).
    """
    return Group(search_tree(base, rows, winner), Text(LEGEND + base.scale.legend, style="dim"), *map(Text, sentences))


def search_tree(base: Row, rows: Sequence[Row], winner: str) -> RenderableType:
    """The trials below the base, each under the one whose region it lies in."""
    by_id = {row.id: row for row in rows}
    way = path_to(by_id, winner)
    tree = Tree(Text(tree_line(base, None, depth=0), no_wrap=True))
    nodes = {base.id: tree}
    for row in rows:
        mark = "won" if row.id == winner else "way" if row.id in way else ""
        above = nodes.get(row.parent or base.id, tree)
        style = "bold" if mark else "" if row.finished else "dim"
        line = tree_line(row, base, depth=len(path_to(by_id, row.id)), mark=mark)
        nodes[row.id] = above.add(Text(line, style=style, no_wrap=True))
    return FullWidth(Group(Text(tree_heading(base.scale), style="bold", no_wrap=True), tree))


def tree_heading(scale: Scale = SCORES) -> str:
    """The names of the tree's columns."""
    cells = _cells("weights", *scale.columns, "seconds")
    return "region (layers × modules)".ljust(LABEL) + cells


def tree_line(row: Row, base: Row | None, *, depth: int, mark: str = "", instead: str | None = None) -> str:
    """One trial's line: its region, then its scores beside the base's, or why there are none to compare.

    Args:
        base: None: the row is the base's own.
        depth: how deep in the tree it stands, the base being 0.
        mark: won, best, way, or nothing.
        instead: stands in the place of the scores, such as how far a running trial is.
    """
    region = "the base, nothing trained" if base is None else row.name
    label = _label(MARKS.get(mark, "") + (TIED if row.tied else "") + region, depth)
    if instead is None and not row.finished:
        instead = _unfinished(row, base)
    if instead is None:
        return label + _scores(row, base)
    return f"{label}  {_cut(instead, WIDTH - LABEL - 2)}"


def path_to(by_id: Mapping[str, Row], trial: str | None) -> list[str]:
    """The ids from a trial up to the first level, its own first; empty where it is not known."""
    path: list[str] = []
    while trial is not None and trial in by_id and trial not in path:
        path.append(trial)
        trial = by_id[trial].parent
    return path


def plan_report(rows: Sequence[PlanRow], train_steps: int, num_done: int = 0, costs: Sequence[str] = ()) -> Group:
    """What a search would try, before anything runs.

    Args:
        rows: the levels, in order.
        train_steps: optimizer steps of each trial.
        num_done: trials that are finished already and will not be repeated.
        costs: what it takes, a sentence a line.
    """
    total = sum(row.trials for row in rows)
    at_most = "" if all(row.exact for row in rows) else "at most "
    tree = Tree(f"{at_most}{many(total, 'trial')} of {many(train_steps, 'optimizer step')} each, and the base once")
    for number, row in enumerate(rows, start=1):
        count = many(row.trials, "trial")
        if not row.exact:
            count = f"at most {count} of {many(len(row.regions), 'region')}"
        level = tree.add(Text(f"level {number}: {row.title}  ({count})"))
        if row.exact:
            for region in row.regions:
                level.add(Text(region_text(region)))
    notes = [Text("A trial that fails is tried once more; its second try is not counted here.", style="dim")]
    if num_done:
        notes.append(Text(f"In the store already, and not to be repeated: {many(num_done, 'trial')}."))
    return Group(tree, *notes, *map(Text, costs))


def progress_line(row: Row, base: Row | None, number: int, at_most: int, known: bool) -> str:
    """One line as a trial ends: which it was, of how many at most, and what came out."""
    head = f"trial {number} of at most {max(at_most, number)}: {row.name}: "
    if not row.finished:
        return head + _unfinished(row, base)
    text = f"{_headline(row, base, ' against the base')}, {row.seconds:.0f} s"
    return head + text + (" (from the store)" if known else "")


def _headline(row: Row, base: Row | None, against: str = "") -> str:
    """The unified score with its change, or loss and drift."""
    scale = row.scale
    if scale is not SCORES:
        change = f" ({scale.change(row.speciality, base.speciality)}{against})" if base else ""
        return f"loss {scale.number(row.speciality)}{change}, drift {scale.number(row.versatility)}"
    change = f" ({scale.change(row.unified, base.unified)}{against})" if base else ""
    return f"unified {scale.number(row.unified)}{change}"


def _unfinished(row: Row, base: Row | None) -> str:
    """What became of a trial that was not trained to its end."""
    reason = " ".join((row.reason or "").split())
    if row.status not in ("paused", "stopped"):
        return f"failed: {reason}"
    text = f"{row.status} after {many(row.steps, 'step')}: {_headline(row, base)}"
    return f"{text}; {reason}" if reason else text


def _label(text: str, depth: int) -> str:
    room = max(12, LABEL - GUIDE * depth)
    return _cut(text, room - 1).ljust(room)


def _scores(row: Row, base: Row | None) -> str:
    weights = "" if base is None else weights_text(row.num_trained)
    return _cells(weights, *row.scale.cells(row, base), f"{row.seconds:.0f}")


def _cells(weights: str, speciality: str, versatility: str, unified: str, seconds: str) -> str:
    return f"{weights:>9}{speciality:>13}{versatility:>13}{unified:>13}{seconds:>9}"
