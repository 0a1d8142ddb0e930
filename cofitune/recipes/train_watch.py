"""Watching a training: each step's figures on the terminal, in metrics.jsonl and in monitors; the validation loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cofitune.config.schema import Config
from cofitune.recipes.train_data import TrainData
from cofitune.recipes.train_state import append_metrics
from cofitune.reports.progress import TrainProgress
from cofitune.softmask.kept import KeptShare
from cofitune.training.loop import StepRecord
from cofitune.training.monitor import Monitor
from cofitune.training.validation import ValidationRecord, validate


class Watch:
    """Every rank has one and must call it, since a validation takes all of them; rank 0's talks and writes.

    Attributes:
        records: the steps so far, on rank 0 also those before a resume.
        validations: the losses on data.validation so far, likewise.
    """

    def __init__(
        self, config: Config, data: TrainData, num_steps: int, engine: Any, folder: Path, kept: KeptShare | None
    ) -> None:
        self._config, self._data, self._num_steps = config, data, num_steps
        self._engine, self._folder, self._kept = engine, folder, kept
        self.records: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []

    def begin(self, progress: TrainProgress, done: int) -> None:
        """Open what is written to; before the very first step, the validation loss of the base."""
        self._progress = progress
        self._monitor = Monitor(self._config.train.report_to, self._folder, self._config.run.name)
        if self._kept is not None:
            self._kept.watch_for(done + 1, self._num_steps)
        if done == 0:
            self._validate(0)

    def after_step(self, record: StepRecord, stopped_by: int) -> None:
        """Tell a step, and validate where it is due, unless a signal has ended the training."""
        record = self._with_kept_share(record)
        self.records.append(record)
        self._progress.advance(record.loss, record.learning_rate, record.tokens_per_second, record.mfu)
        self._write(record)
        due = record.step % self._config.train.validation_steps == 0 or record.step == self._num_steps
        if due and not stopped_by:
            self._validate(record.step)

    def _with_kept_share(self, record: StepRecord) -> StepRecord:
        if self._kept is None:
            return record
        if self._kept.watching:
            share = self._kept.read(self._engine.device)
            record = replace(record, kept_share={str(layer): round(s, 4) for layer, s in share.items()})
        self._kept.watch_for(record.step + 1, self._num_steps)
        return record

    def _validate(self, step: int) -> None:
        if not self._data.validation or self._data.tokenizer is None:
            return
        batch, pad = self._config.train.per_device_train_batch_size, self._data.tokenizer.pad_token_id
        record = validate(self._engine, self._data.validation, batch, pad, step)
        self.validations.append(record)
        self._write(record)
        loss = "not finite" if record.validation_loss is None else f"{record.validation_loss:.4f}"
        self._progress.say(f"step {step}/{self._num_steps}  validation loss {loss}")

    def _write(self, record: StepRecord | ValidationRecord) -> None:
        if torch.distributed.get_rank() == 0:
            append_metrics(self._folder / "metrics.jsonl", record)
            figures = record.as_dict()
            for layer, share in (figures.pop("kept_share", None) or {}).items():
                figures[f"kept_share/layer_{layer}"] = share
            self._monitor.write(figures.pop("step"), figures)
