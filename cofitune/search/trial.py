"""A trial: one region trained for a few steps from the base, and what a small evaluation said of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from cofitune.checked import without_checksum
from cofitune.errors import RegionError
from cofitune.model.region import Region, region_from_dict
from cofitune.search.measured import Curve, curve_from_json

BASE = "base"  # the id of the trial that trains nothing: the untouched model, which the others are compared with
ID_LENGTH = 12


class TrialError(Exception):
    """Why one trial failed. The search records it, tries the trial once more, and continues."""


@dataclass(frozen=True)
class Trial:
    """One line of the store: how far a trial has come, and what was said of it there.

    Attributes:
        id: hash of the region and of everything else that the scores depend on, or `base`.
        region: what was trained; None for the base.
        status: done, with the scores of the last step; paused, with those of an earlier one, to continue from;
            stopped, likewise, and the search left it there; or failed, with a reason.
        level: 1 for the first level of the search, 0 for the base.
        parent: id of the trial whose region this one lies in; None at the first level.
        seed: the training's seed.
        num_trained: trained weights and biases.
        steps: optimizer steps that the scores are of; they are never compared with those of other steps. 0 of the base.
        start_step: the step that this part of the trial went on from.
        learning_rate: peak rate of its training; None for the base.
        speciality, versatility, unified: the scores, 0-100 (100: everything right, 0: chance).
        categories: versatility's parts (gen_kn, gen_rs, instruct), same scale.
        intervals: of speciality, versatility and unified, the ends of the 95 % interval of the change against the base.
        curve: under `search.measure: loss`, what it came to at a few of its steps (search/measured.py), the last one
            those of `steps`; it has no scores then.
        margins: likewise, for gen_kn and gen_rs: mean log-likelihood of the right choice minus that of the likeliest
            wrong one, in nats; higher is better.
        train_loss: loss of the last optimizer step, in nats a token; None where it is unknown or not finite.
        seconds: wall time of this part.
        parts: the same, by what it went into: start, train, evaluate, other.
        reason: why it failed or was stopped.

    Raises:
        ValueError: neither a curve nor a finite unified score, or another status than these four.
    """

    id: str
    region: Region | None
    status: Literal["done", "paused", "stopped", "failed"]
    level: int
    seed: int
    num_trained: int
    seconds: float
    steps: int = 0
    start_step: int = 0
    parent: str | None = None
    learning_rate: float | None = None
    speciality: float | None = None
    versatility: float | None = None
    unified: float | None = None
    categories: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curve: Curve = ()
    margins: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.status not in ("done", "paused", "stopped", "failed"):
            raise ValueError(f"a trial is done, paused, stopped or failed, not {self.status!r}")
        if self.scored and not self.curve and (self.unified is None or not math.isfinite(self.unified)):
            raise ValueError("a finished trial needs a unified score, or a curve of losses")

    @property
    def done(self) -> bool:
        """Whether it was trained to the end and scored there: nothing else can win."""
        return self.status == "done"

    @property
    def loss(self) -> float | None:
        """Speciality loss after its last step, in nats a token; None of a trial with scores."""
        return self.curve[-1].loss if self.curve else None

    @property
    def drift(self) -> float | None:
        """Drift after its last step, likewise."""
        return self.curve[-1].drift if self.curve else None

    @property
    def scored(self) -> bool:
        """Whether it has scores, of whichever step."""
        return self.status != "failed"

    def to_json(self) -> str:
        """One line of JSON, without a line break."""
        value = {**asdict(self), "region": self.region.to_dict() if self.region else None}
        if not self.curve:  # of a trial with scores
            del value["curve"], value["margins"]
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def trial_from_json(line: str) -> Trial:
    """Read what `Trial.to_json` wrote, and compare it with its checksum where it has one.

    Raises:
        ValueError: it is not a trial's line.
    """
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a trial is a JSON object, not {type(value).__name__}")
    value = without_checksum(value)
    try:
        region = value["region"]
        if region is not None:
            value["region"] = region_from_dict(region)
        value["intervals"] = {name: (low, high) for name, (low, high) in value["intervals"].items()}
        value["curve"] = curve_from_json(value.get("curve", ()))
        return Trial(**value)
    except (KeyError, TypeError, ValueError, AttributeError, RegionError) as error:
        raise ValueError(f"not a trial: {error}") from None


def trial_id(region: Region | None, identity: Mapping[str, object]) -> str:
    """Name a trial by what its scores depend on, so that the same trial has the same id in every process.

    Args:
        region: what is trained; None for the base.
        identity: base fingerprint, train settings, data hashes and eval settings, as JSON values.
    """
    if region is None:
        return BASE
    content = json.dumps({"region": region.to_dict(), "identity": identity}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]


def _finite(value: object) -> object:
    """JSON has no NaN: what is not finite is written as null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
