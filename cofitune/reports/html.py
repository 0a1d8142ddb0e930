"""One page of HTML that needs nothing else: no script, no font, no picture from anywhere. Takes plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cofitune.reports.evaluation.findings import Finding
from cofitune.reports.evaluation.items import ItemGroup
from cofitune.reports.evaluation.rows import Cell, ScoreRow
from cofitune.reports.figure import Picture
from cofitune.reports.search.rows import TrialRow
from cofitune.reports.text import number, signed
from cofitune.reports.training.trained_map import TrainedMap

Facts = Sequence[tuple[str, str]]  # a term and what is said of it


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its models, the base first; the table; what else is to be said; the gate's verdicts."""

    models: Sequence[str]
    findings: Sequence[Finding]
    rows: Sequence[ScoreRow]
    notes: Sequence[str]
    gate: Sequence[str]


@dataclass(frozen=True)
class Changed:
    """The items that one model lost and gained against the base."""

    model: str
    lost: Sequence[ItemGroup]
    gained: Sequence[ItemGroup]

    @property
    def parts(self) -> Sequence[tuple[str, int, Sequence[ItemGroup]]]:
        """Lost and gained, each with its number of items."""
        return [
            (w, sum(g.count for g in groups), groups) for w, groups in (("lost", self.lost), ("gained", self.gained))
        ]


@dataclass(frozen=True)
class Search:
    """A search: its trials in the tree's order, and its sentence."""

    rows: Sequence[TrialRow]
    reason: str


@dataclass(frozen=True)
class Trained:
    """What a training moved: the map, the counts, and the hashes that prove the rest frozen."""

    map: TrainedMap
    counts: str
    proof: str
    hashes: Facts


@dataclass(frozen=True)
class Settings:
    """A config: which commands were run with it, the versions and git state then, and its text."""

    commands: Sequence[str]
    environment: Sequence[str]
    text: str


@dataclass(frozen=True)
class Run:
    """One run; every part is there only where its files are.

    Attributes:
        key: names its sections within the page.
        absent: what is not here, a sentence each.
    """

    key: str
    name: str
    facts: Facts = ()
    scores: Evaluation | None = None
    changed: Sequence[Changed] = ()
    comparison: Comparison | None = None
    search: Search | None = None
    importance: str = ""
    training: Facts = ()
    trained: Trained | None = None
    settings: Sequence[Settings] = ()
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    absent: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """What `cofitune compare` found: sentences, and tables of text."""

    sentences: Sequence[str]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Table:
    """A table of text with its caption; a cell's further lines stand small below its first. A long one is folded."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class OverviewRow:
    """A run in the table over all: a few words, and its changes against the base."""

    key: str
    name: str
    words: Sequence[str]
    changes: Sequence[Cell]


@dataclass(frozen=True)
class Overview:
    """All runs of a folder side by side; `note` says whether they may be compared."""

    words: Sequence[str]
    changes: Sequence[str]
    rows: Sequence[OverviewRow]
    note: str
    picture: Picture | None


@dataclass(frozen=True)
class Page:
    """The whole page; `overview` is there where it is about several runs. `drawn`: whether matplotlib was at hand."""

    title: str
    runs: Sequence[Run]
    overview: Overview | None
    drawn: bool
    version: str


def render(page: Page) -> str:
    """The page as text. Whatever comes from data, answers or names is escaped; a policy forbids scripts besides."""
    environment = Environment(
        loader=PackageLoader("cofitune.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["svg"] = Markup  # our own drawings alone, whose texts matplotlib has escaped
    environment.filters |= {"code": _code, "signed": signed, "number": number}
    return environment.get_template("report.html").render(page=page)


def _code(text: str) -> Markup:
    """Escape a sentence; what stands in `backticks` is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
