"""A trial's curve: speciality loss and drift, measured at a few of its steps while it trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console

from cofitune.data.chat import Example
from cofitune.errors import UserError
from cofitune.recipes.train.metrics import append_metrics
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.train.steps import TrainRun
from cofitune.recipes.trial.loss_items import LossItems, choice_margins
from cofitune.reports.console import say
from cofitune.search.measured import Curve, CurvePoint
from cofitune.training.drift import DriftRecord, HeldOut, measure_drift
from cofitune.training.loop import StepRecord
from cofitune.training.prefix_cache import Around, nothing_around
from cofitune.training.validation import ValidationRecord, validate


class CurveRecorder:
    """Measures a trial after some of its steps. Every rank has one, and takes its share of the items.

    What it measures goes into metrics.jsonl, as a training's validation does: a part that continues finds it there.

    Attributes:
        seconds: what measuring took in this part.
    """

    def __init__(self, run: TrainRun, items: LossItems, console: Console, around: Around = nothing_around) -> None:
        """Of one part of a trial.

        Args:
            around: what each forward pass runs in.
        """
        self._around = around
        self._run, self._items, self._console = run, items, console
        self._answers = _held_out(run.plan)
        self._at = frozenset(run.plan.config.search.measured_steps)
        self.seconds = 0.0

    def after_step(self, record: StepRecord, stopped_by: int) -> None:
        """Measure after a step, where that is due. Takes no part in the training: its bits stay the same."""
        if record.step not in self._at or stopped_by:
            return
        begun = time.perf_counter()
        run, size, pad = self._run, self._items.batch_size, self._items.pad_token_id
        loss = validate(run.engine, self._items.development, size, pad, record.step, self._around)
        drift = measure_drift(run.engine, self._answers, size, pad, record.step, self._around)
        run.watch.validations.append(loss)
        run.watch.drifts.append(drift)
        if torch.distributed.get_rank() == 0:
            append_metrics(run.plan.folder / "metrics.jsonl", loss)
            append_metrics(run.plan.folder / "metrics.jsonl", drift)
        point = _point(loss, drift)
        self.seconds += time.perf_counter() - begun
        say(
            self._console, f"step {point.steps}  speciality loss {point.loss:.4f}  drift {point.drift:.4f} nats a token"
        )

    def margins(self) -> dict[str, float]:
        """As `choice_margins`, of the model as it is now."""
        begun = time.perf_counter()
        attention = self._run.plan.config.model.attn_implementation
        found = choice_margins(self._run.engine, self._items, self._around, any_attention=attention == "auto")
        self.seconds += time.perf_counter() - begun
        return found

    def curve(self) -> Curve:
        """What was measured so far; on rank 0 also before a resume."""
        return tuple(map(_point, self._run.watch.validations, self._run.watch.drifts))


def _point(loss: ValidationRecord, drift: DriftRecord) -> CurvePoint:
    # on greedy answers the drift by their log-probabilities may fall below 0 while the divergence rises
    moved = drift.drift if drift.kl is None else drift.kl
    if loss.validation_loss is None or moved is None:
        raise UserError(f"training diverged: after step {loss.step} the speciality loss or the drift is not finite")
    return CurvePoint(loss.step, loss.validation_loss, moved)


def _held_out(plan: TrainPlan) -> HeldOut:
    """The held-out answers, read once, long ones first."""
    held_out = plan.rehearsal.held_out if plan.rehearsal else None
    if held_out is None:
        raise UserError("search.measure: loss: the rehearsal holds out no answer to measure drift on")
    examples: Sequence[Example] = sorted(held_out.examples, key=lambda example: -len(example.input_ids))
    return replace(held_out, examples=examples)
