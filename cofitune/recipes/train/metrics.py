"""Watching a training: each step's figures on the terminal, in metrics.jsonl and in monitors; validation and drift."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cofitune.errors import RepairWarning
from cofitune.files import write_text
from cofitune.jsonl import append_line, json_object
from cofitune.recipes.train.plan import TrainPlan
from cofitune.reports.training.progress import TrainProgress
from cofitune.softmask.retained import RetainedUpdate
from cofitune.training.drift import DriftRecord, HeldOut, measure_drift
from cofitune.training.loop import StepRecord
from cofitune.training.monitor import Monitor
from cofitune.training.validation import ValidationRecord, validate

if TYPE_CHECKING:
    from cofitune.zero import Engine


class DriftReached(Exception):
    """The model has drifted further than `train.max_drift` allows. Raised on every rank."""

    def __init__(self, record: DriftRecord, limit: float) -> None:
        self.record, self.limit = record, limit
        super().__init__(f"drift {record.drift} at step {record.step} exceeds {limit}")


class Watch:
    """Every rank has one and must call it, since a validation takes all of them; rank 0's talks and writes.

    Args:
        retained: measures the share of an update that the soft mask leaves; None without a mask.
        held_out: what drift is measured on; None: it is not measured.
        is_saved: whether a checkpoint of a step follows, by its record and the signal that ended it, or 0.

    Attributes:
        records: the steps so far, on rank 0 also those before a resume.
        validations: the losses on data.validation so far, likewise.
        drifts: the drift so far, likewise.
        done: steps that were taken; of some of them the records may be lost.
    """

    def __init__(
        self,
        plan: TrainPlan,
        engine: Engine,
        retained: RetainedUpdate | None,
        held_out: HeldOut | None,
        is_saved: Callable[[StepRecord, int], bool],
    ) -> None:
        self._plan, self._train, self._num_steps = plan, plan.config.train, plan.steps.num_steps
        self._engine, self._retained, self._held_out, self._is_saved = engine, retained, held_out, is_saved
        self._file = plan.folder / "metrics.jsonl"
        self.records: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []
        self.drifts: list[DriftRecord] = []
        self.done = 0

    def read(self, done: int) -> None:
        """Take over what was written before step `done`, and cut off what came after it."""
        self.done = done
        self.records, self.validations, self.drifts = truncate_metrics(self._file, done)

    def begin(self, progress: TrainProgress, done: int) -> None:
        """Open what is written to; before the very first step, the validation loss and the drift of the base."""
        self._progress = progress
        self._monitor = Monitor(self._train.report_to, self._plan.folder, self._plan.config.run.name)
        if self._retained is not None:
            self._retained.watch_for(done + 1, self._num_steps)
        if done == 0:
            self._validate(0)
            self._measure_drift(0)

    def after_step(self, record: StepRecord, stopped_by: int) -> None:
        """Tell a step; validate and measure drift where it is due, unless a signal has ended the training.

        Under `train.max_drift` drift is measured before every checkpoint, too: none is written above the limit.

        Raises:
            DriftReached: the drift is above `train.max_drift`.
        """
        record = self._with_kept_share(record)
        self.records.append(record)
        self.done = record.step
        self._progress.advance(
            record.loss, record.learning_rate, record.tokens_per_second, record.mfu, record.rehearsal_loss
        )
        self._write(record)
        due = record.step % self._train.validation_steps == 0 or record.step == self._num_steps
        if due and not stopped_by:
            self._validate(record.step)
        limited = self._train.max_drift is not None and self._is_saved(record, stopped_by)
        if (due and not stopped_by) or limited:
            self._measure_drift(record.step)

    def _with_kept_share(self, record: StepRecord) -> StepRecord:
        if self._retained is None:
            return record
        if self._retained.watching:
            share = self._retained.read(self._engine.device)
            record = replace(record, kept_share={str(layer): round(s, 4) for layer, s in share.items()})
        self._retained.watch_for(record.step + 1, self._num_steps)
        return record

    def _validate(self, step: int) -> None:
        data = self._plan.data
        if not data.validation or data.tokenizer is None:
            return
        batch, pad = self._train.per_device_train_batch_size, data.tokenizer.pad_token_id
        record = validate(self._engine, data.validation, batch, pad, step)
        self.validations.append(record)
        self._write(record)
        loss = "not finite" if record.validation_loss is None else f"{record.validation_loss:.4f}"
        self._progress.say(f"step {step}/{self._num_steps}  validation loss {loss}")

    def _measure_drift(self, step: int) -> None:
        tokenizer = self._plan.data.tokenizer
        if self._held_out is None or tokenizer is None:
            return
        batch, pad = self._train.per_device_train_batch_size, tokenizer.pad_token_id
        record = measure_drift(self._engine, self._held_out, batch, pad, step)
        self.drifts.append(record)
        self._write(record)
        drift = "not finite" if record.drift is None else f"{record.drift:.4f}".replace("-0.0000", "0.0000")
        kl = "" if record.kl is None else f"  KL {record.kl:.4f}"
        self._progress.say(f"step {step}/{self._num_steps}  drift {drift}{kl} nats a token")
        limit = self._train.max_drift
        if limit is not None and step and not record.is_below(limit):
            raise DriftReached(record, limit)

    def _write(self, record: StepRecord | ValidationRecord | DriftRecord) -> None:
        if torch.distributed.get_rank() == 0:
            append_metrics(self._file, record)
            values = ((name, value) for name, value in record.as_dict().items() if name != "step")
            figures = {name: value for name, value in values if isinstance(value, int | float)}
            shares = record.kept_share if isinstance(record, StepRecord) else None
            for layer, share in (shares or {}).items():
                figures[f"kept_share/layer_{layer}"] = share
            self._monitor.write(record.step, figures)


def truncate_metrics(path: Path, step: int) -> tuple[list[StepRecord], list[ValidationRecord], list[DriftRecord]]:
    """Cut metrics.jsonl after `step`, so that every step occurs once, and return what stays.

    The weights do not depend on it: lines that are damaged or gone are left out, and a RepairWarning says which steps.
    """
    kept, records = list[str](), dict[int, StepRecord]()
    validations, drifts = list[ValidationRecord](), list[DriftRecord]()
    for line in path.read_bytes().splitlines() if step and path.is_file() else ():
        try:
            entry = json_object(line.decode())
            if not 0 <= entry["step"] <= step:
                continue
            if "loss" in entry:
                records[entry["step"]] = StepRecord(**entry)
            elif "validation_loss" in entry:
                validations.append(ValidationRecord(**entry))
            elif "drift" in entry:
                drifts.append(DriftRecord(**entry))
            else:  # no record of ours: a damaged name, say
                continue
            kept.append(json.dumps(entry) + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    missing = [number for number in range(1, step + 1) if number not in records]
    if missing:
        warnings.warn(f"{path}: the figures of {_steps(missing)} are damaged or gone", RepairWarning, stacklevel=1)
    if kept:
        write_text(path, "".join(kept))
    else:
        path.unlink(missing_ok=True)
    return [records[number] for number in sorted(records)], validations, drifts


def _steps(numbers: list[int]) -> str:
    """`step 3`, or `steps 1-4, 7` in at most a few words."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    shown = ", ".join("-".join(map(str, part)) for part in ranges[:5]) + (", …" if len(ranges) > 5 else "")
    return f"step{'s' if len(numbers) > 1 else ''} {shown}"


def append_metrics(path: Path, record: StepRecord | ValidationRecord | DriftRecord) -> None:
    """Add a line; it is on the disk before the checkpoint that relies on it."""
    append_line(path, json.dumps(record.as_dict()))
