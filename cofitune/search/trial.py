"""A trial: one region trained for a few steps from the base, and what a small evaluation said of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cofitune.errors import RegionError
from cofitune.model.region import Region, region_from_dict

BASE = "base"  # the id of the trial that trains nothing: the untouched model, which the others are compared with
ID_LENGTH = 12


class TrialError(Exception):
    """Why one trial failed. The search records it, tries the trial once more, and goes on."""


@dataclass(frozen=True)
class Trial:
    """One line of the store.

    Attributes:
        id: hash of the region and of everything else that the scores depend on, or `base`.
        region: what was trained; None for the base.
        status: done, with scores; or failed, with a reason.
        level: 1 for the first level of the search, 0 for the base.
        parent: id of the trial whose region this one lies in; None at the first level.
        seed: the training's seed.
        num_trained: trained weights and biases.
        speciality, versatility, unified: the scores, 0-100 (100: everything right, 0: chance).
        categories: versatility's parts (gen_kn, gen_rs, instruct), same scale.
        train_loss: loss of the last optimizer step, in nats a token; None where it is unknown or not finite.
        seconds: wall time of training and evaluation.
        reason: why it failed.

    Raises:
        ValueError: a finished trial without a finite unified score, or another status than these two.
    """

    id: str
    region: Region | None
    status: Literal["done", "failed"]
    level: int
    seed: int
    num_trained: int
    seconds: float
    parent: str | None = None
    speciality: float | None = None
    versatility: float | None = None
    unified: float | None = None
    categories: dict[str, float | None] = field(default_factory=dict)
    train_loss: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.status not in ("done", "failed"):
            raise ValueError(f"a trial is done or failed, not {self.status!r}")
        if self.done and (self.unified is None or not math.isfinite(self.unified)):
            raise ValueError("a finished trial needs a unified score")

    @property
    def done(self) -> bool:
        """Whether it has scores."""
        return self.status == "done"

    def to_json(self) -> str:
        """One line of JSON, without a line break."""
        value = {**asdict(self), "region": self.region.to_dict() if self.region else None}
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def trial_from_json(line: str) -> Trial:
    """Read what `Trial.to_json` wrote.

    Raises:
        ValueError: it is not a trial's line.
    """
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a trial is a JSON object, not {type(value).__name__}")
    try:
        region = value["region"]
        if region is not None:
            value["region"] = region_from_dict(region)
        return Trial(**value)
    except (KeyError, TypeError, RegionError) as error:
        raise ValueError(f"not a trial: {error}") from None


def trial_id(region: Region | None, identity: Mapping[str, Any]) -> str:
    """Name a trial by what its scores depend on, so that the same trial has the same id in every process.

    Args:
        region: what is trained; None for the base.
        identity: base fingerprint, train settings, data hashes and eval settings, as JSON values.
    """
    if region is None:
        return BASE
    content = json.dumps({"region": region.to_dict(), "identity": identity}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]


def rank(trial: Trial) -> tuple[Any, ...]:
    """Sorting key of finished trials, best first: the highest unified score; of equals the one with fewer trained
    weights, then the lower first layer (the last parts only make the order total)."""
    score = -math.inf if trial.unified is None else trial.unified
    region = trial.region
    place = (region.layers, region.modules) if region else ((), ())
    return (-score, trial.num_trained, *place)


RunTrial = Callable[[Region, int], Trial]


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite is written as null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
