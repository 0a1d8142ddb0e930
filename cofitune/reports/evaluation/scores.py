"""What `scores.json` holds, as the tables, the pictures and the report read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cofitune.checked import shaped
from cofitune.reports.shape import read_shaped

FORMAT = 2
CATEGORIES = ("speciality", "gen_kn", "gen_rs", "instruct")
DRIFT = "drift"  # of tasks that enter no mean: how far a model has moved from the base


@dataclass(frozen=True)
class Change:
    """A score's change with the ends of its 95 % interval; `within_noise`: a seed alone could make it, if known."""

    value: float
    low: float
    high: float
    within_noise: bool | None = None
    p_holm: float | None = None
    lost: list[int] = field(default_factory=list)
    gained: list[int] = field(default_factory=list)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, 0 where it contains it."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Ratio:
    """A ratio in percent with its interval; without a value, the reason why it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None


@dataclass(frozen=True)
class Task:
    """A task of the evaluation; `unit`: share, nats, or another scale of its own."""

    category: str
    metric: str
    items: int
    unit: str
    higher_is_better: bool = True
    sha256: str = ""
    left_out: list[object] = field(default_factory=list)

    @property
    def counted(self) -> bool:
        """Whether it enters the means, as a score from 0 (guessing) to 100."""
        return self.unit == "share"

    @property
    def digits(self) -> int:
        """Decimals that its figures are shown with."""
        return 1 if self.counted else 3


@dataclass(frozen=True)
class TaskScore:
    """One model's figure of a task: the mean of its items in the metric's unit, and the score."""

    raw: float
    score: float


@dataclass(frozen=True)
class Model:
    """One model's scores; the means are None where there is no task to take them from."""

    categories: dict[str, float | None]
    versatility: float | None
    unified: float | None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    path: str = "not known"
    fingerprint: str | None = None
    delta_sha256: str | None = None
    alpha: float | None = None  # None: all of the training, or a whole model

    def score(self, name: str) -> float | None:
        """A category or summary by its name."""
        by_name = {**self.categories, "versatility": self.versatility, "unified": self.unified}
        return by_name[name]


@dataclass(frozen=True)
class Comparison:
    """One model's changes against another's: of summaries and categories, and of tasks by title."""

    model: str
    against: str
    summary: dict[str, Change | None]
    tasks: dict[str, Change] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True)
class NoiseScores:
    """Standard deviations over training seeds."""

    summary: dict[str, float | None]


@dataclass(frozen=True)
class NoiseLimits:
    """How far from 0 a change must be to be more than another training seed makes, against the base."""

    base: NoiseScores


@dataclass(frozen=True)
class Noise:
    """How far training seeds differ, by groups of runs; without scores, why it is not known."""

    scores: NoiseScores | None = None
    limits: NoiseLimits | None = None
    runs: list[list[str]] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class GateVerdict:
    """One requirement of the gate, and the change that it was held against."""

    require: str
    met: bool
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """An evaluation: the models, the base first, and their comparisons."""

    models: dict[str, Model]
    comparisons: list[Comparison]
    tasks: dict[str, Task] = field(default_factory=dict)
    speciality_weight: float = 0.5
    missing: list[str] = field(default_factory=list)
    noise_floor: Noise = field(default_factory=Noise)
    gate: list[GateVerdict] = field(default_factory=list)

    @classmethod
    def of(cls, content: Mapping[str, object]) -> Scores:
        """Take the content of scores.json.

        Raises:
            ValueError: something lacks or is of another type.
        """
        scores = shaped(cls, content)
        if not scores.models:
            raise ValueError("models is empty")
        return scores

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read scores.json.

        Raises:
            ArtifactError: it is missing, damaged, or of another format.
        """
        return read_shaped(path, "evaluation", FORMAT, cls.of)

    @property
    def base(self) -> str:
        """The name of the model that all are compared with."""
        return next(iter(self.models))

    @property
    def others(self) -> list[str]:
        """The names of the other models."""
        return list(self.models)[1:]

    @property
    def against_base(self) -> dict[str, Comparison]:
        """The comparisons with the base, by model."""
        return {c.model: c for c in self.comparisons if c.against == self.base}

    def titles(self, category: str) -> list[str]:
        """The tasks of a category."""
        return [title for title, task in self.tasks.items() if task.category == category]

    def change(self, model: str, name: str, title: str | None) -> Change | None:
        """A model's change against the base: of a task, or of the category or summary `name`."""
        comparison = self.against_base[model]
        return comparison.tasks[title] if title is not None else comparison.summary[name]
