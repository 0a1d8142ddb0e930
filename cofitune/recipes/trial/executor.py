"""What a search asks of whoever runs its trials: requests go in, results come back as they end, in any order.

The search decides; how processes start, on which machines and how many at once belongs to the launcher above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cofitune.config.schema import Config


@dataclass(frozen=True)
class TrialRequest:
    """One trial, or the next part of one.

    Attributes:
        id: the trial's.
        config: complete; its `output_dir` is `folder`.
        folder: where the trial leaves `train/metrics.jsonl` and `eval/` (scores.json, samples/); the base's
            answers are found in `eval/cache` if they were handed on.
        train: without, nothing is trained and the base itself is scored.
        stop_step: the optimizer step after which the training pauses and is evaluated; the same request with a later
            step, or None for the last, continues from there to the same bits as if it had never paused.
    """

    id: str
    config: Config
    folder: Path
    train: bool = True
    stop_step: int | None = None


@dataclass(frozen=True)
class TrialResult:
    """How a request ended.

    Attributes:
        error: why it failed, in one line; None: its files are in the request's folder.
        seconds: wall time of its parts: `start`, `train`, `evaluate`, `other`.
    """

    request: TrialRequest
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a trial takes, from a few real steps and a few items.

    Attributes:
        seconds_to_start: until a fresh worker can train; a trial in a worker that is there needs next to nothing of it.
        seconds_a_step: of one optimizer step in this region.
        seconds_to_evaluate: for all items of all tasks.
    """

    seconds_to_start: float
    seconds_a_step: float
    seconds_to_evaluate: float


class TrialExecutor(Protocol):
    """Runs trials, one after the other or several at once. No result depends on what ran before it."""

    def __call__(self, requests: Sequence[TrialRequest]) -> Iterator[TrialResult]:
        """Run all of them and yield each result as it ends. Closing the iterator ends what is still running."""
