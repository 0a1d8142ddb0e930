"""What `compare.json` holds, as the tables, the picture and the report read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofitune.checked import shaped
from cofitune.reports.shape import Entry, read_shaped

FORMAT = 1
MATCHED = ("versatility", "instruct")  # what is held against the reference's at equal speciality
SCORES = ("speciality", "versatility", "gen_kn", "gen_rs", "instruct")


@dataclass(frozen=True)
class Difference:
    """A difference and its 95 % interval; none where the level lies outside of a method's range in too many draws.

    Attributes:
        draws_inside: the share of the draws that the interval rests on.
        low_corrected, high_corrected: the interval that holds on all levels at once; none where there is one level.
        with_equal_points: the same where both frontiers have as many points as the poorer one; none where they have.
    """

    value: float
    low: float | None
    high: float | None
    draws_inside: float
    low_corrected: float | None = None
    high_corrected: float | None = None
    with_equal_points: Difference | None = None

    @property
    def is_shown(self) -> bool:
        """Whether 0 is left out, corrected for the number of levels; with equally many points likewise."""
        fewer = self.with_equal_points
        return self.leaves_out_zero and (fewer is None or (fewer.leaves_out_zero and fewer.value * self.value > 0))

    @property
    def leaves_out_zero(self) -> bool:
        """Whether the interval of all points does not contain 0, corrected for the number of levels."""
        low = self.low if self.low_corrected is None else self.low_corrected
        high = self.high if self.high_corrected is None else self.high_corrected
        return low is not None and high is not None and not low <= 0 <= high


@dataclass(frozen=True)
class Row:
    """One method at a level of speciality; a `reason`: why it says nothing there."""

    reason: str | None
    values: dict[str, float | None]
    differences: dict[str, Difference | None]


@dataclass(frozen=True)
class Level:
    """A speciality at which the methods are matched: that of a `point`, chosen for `why`; a row a method."""

    speciality: float
    point: str
    why: str
    rows: dict[str, Row]


@dataclass(frozen=True)
class Control:
    """The masked methods against one of their controls."""

    control: str
    matched: list[Level]


@dataclass(frozen=True)
class Point:
    """One setting of a method, means over the seeds; `dominated_by`: the point that is better, if any is."""

    id: str
    method: str
    learning_rate: float
    alpha: float
    scores: dict[str, float | None]
    on_frontier: bool
    dominated_by: str | None = None

    @property
    def speciality(self) -> float:
        """Its speciality score; a comparison without one is refused before it begins."""
        return self.scores["speciality"] or 0.0


@dataclass(frozen=True)
class Method:
    """What a method trains."""

    trained_weights: int = 0
    all_weights: int = 1
    steps: int = 0


@dataclass(frozen=True)
class Partial:
    """How much of a comparison is there."""

    runs: int
    done: int
    missing: list[str]


@dataclass(frozen=True)
class Run:
    """One run of the comparison."""

    run: str
    status: str
    reason: str | None


@dataclass(frozen=True)
class Comparison:
    """Methods, their points and frontiers, and what they come to at equal speciality."""

    reference: str
    partial: Partial | None
    seeds: list[int]
    methods: dict[str, Method]
    base: dict[str, float | None]
    points: list[Point]
    frontiers: dict[str, list[str]]
    matched: list[Level]
    runs: list[Run]
    alphas: list[float] = field(default_factory=list)
    against_controls: list[Control] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Entry) -> Comparison:
        """Take the content of compare.json.

        Raises:
            ValueError: something lacks or is of another type.
        """
        try:
            controls = [{**c, "matched": _levels(c["matched"])} for c in content.get("against_controls", ())]
            changed = {"matched": _levels(content["matched"]), "against_controls": controls}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"matched: {error!r}") from None
        return shaped(cls, {**content, **changed})

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read compare.json.

        Raises:
            ArtifactError: it is missing, damaged, or of another format.
        """
        return read_shaped(path, "comparison", FORMAT, cls.of)

    @property
    def levels(self) -> Iterator[tuple[str, Level]]:
        """Every level with what its rows are held against: the reference's first, then each control's."""
        yield from ((self.reference, level) for level in self.matched)
        for held in self.against_controls:
            yield from ((held.control, level) for level in held.matched)

    def of_method(self, method: str) -> list[Point]:
        """A method's points."""
        return [point for point in self.points if point.method == method]

    def scores_of(self, point: str) -> dict[str, float | None]:
        """The scores of a point by its id, or of the base."""
        return self.base if point == "base" else {p.id: p.scores for p in self.points}[point]


def _levels(levels: Sequence[Entry]) -> list[dict[str, object]]:
    """The file has a row's values and differences side by side."""

    def row(content: Entry) -> dict[str, object]:
        return {
            "reason": content["reason"],
            "values": {score: content.get(score) for score in MATCHED},
            "differences": {score: content.get(f"{score}_against_reference") for score in MATCHED},
        }

    return [{**level, "rows": {method: row(r) for method, r in level["rows"].items()}} for level in levels]
