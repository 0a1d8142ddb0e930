"""What a search asks of whoever runs its trials: requests go in, results come back as they end, in any order.

The search decides; how processes start, on which machines and how many at once belongs to the launcher above. Requests
and results are the same on every path, and travel between processes as the JSON that their own methods give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cofitune.config.schema import Config
from cofitune.search.measured import Curve, curve_from_json, curve_to_json


@dataclass(frozen=True)
class TrialRequest:
    """One trial, or the next part of one.

    Attributes:
        id: the trial's.
        config: complete; its `output_dir` is `folder`, and `search.measure` says what is measured.
        folder: where the trial leaves `train/metrics.jsonl` and, with scores, `eval/` (scores.json, samples/); the
            base's answers are found in `eval/cache` if they were handed on.
        train: without, nothing is trained and the base itself is measured.
        stop_step: the optimizer step after which the training pauses and is measured; the same request with a later
            step, or None for the last, continues from there to the same bits as if it had never paused.
    """

    id: str
    config: Config
    folder: Path
    train: bool = True
    stop_step: int | None = None

    def to_json(self) -> dict[str, object]:
        """The request as JSON takes it."""
        return {
            "id": self.id,
            "config": self.config.model_dump(mode="json"),
            "folder": str(self.folder),
            "train": self.train,
            "stop_step": self.stop_step,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], folder: Path | None = None) -> TrialRequest:
        """Read what `to_json` gave.

        Args:
            folder: where the trial lives here, if that is another place than there.

        Raises:
            UserError: a path in the config cannot be used here.
        """
        place = folder or Path(value["folder"])
        config = Config.model_validate({**value["config"], "output_dir": str(place)})
        return cls(value["id"], config, place, value["train"], value["stop_step"])


@dataclass(frozen=True)
class TrialResult:
    """How a request ended.

    Attributes:
        error: why it failed, in one line; None: its files are in the request's folder.
        seconds: wall time of its parts: `start`, `train`, `evaluate`, `other`.
        curve: under `search.measure: loss`, what was measured so far, earlier parts included; the base has one point.
        margins: likewise, of gen_kn and gen_rs where they have choices; nothing of a trial that has paused.
    """

    request: TrialRequest
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    curve: Curve = ()
    margins: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The result as JSON takes it, without its request, which the other side has."""
        return {
            "error": self.error,
            "seconds": self.seconds,
            "curve": curve_to_json(self.curve),
            "margins": self.margins,
        }

    @classmethod
    def from_json(cls, request: TrialRequest, value: Mapping[str, Any]) -> TrialResult:
        """Read what `to_json` gave, as the answer to a request; what it does not say is nothing."""
        return cls(
            request,
            value.get("error"),
            dict(value.get("seconds", {})),
            curve_from_json(value.get("curve", ())),
            dict(value.get("margins", {})),
        )


@dataclass(frozen=True)
class Measured:
    """What a trial takes, from a few real steps and a few items.

    Attributes:
        seconds_to_start: until a fresh worker can train; a trial in a worker that is there needs next to nothing of it.
        seconds_a_step: of one optimizer step in this region.
        seconds_to_evaluate: for all items of all tasks, or for all measurements of losses and drift.
    """

    seconds_to_start: float
    seconds_a_step: float
    seconds_to_evaluate: float


class TrialExecutor(Protocol):
    """Runs trials, one after the other or several at once. No result depends on what ran before it."""

    def __call__(self, requests: Sequence[TrialRequest]) -> Iterator[TrialResult]:
        """Run all of them and yield each result as it ends. Closing the iterator ends what is still running."""
