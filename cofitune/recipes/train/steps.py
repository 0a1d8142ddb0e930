"""The steps of a training: the model made ready for its region and mask, then step after step, all of it watched."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.config.schema import Config
from cofitune.errors import Stopped, UserError
from cofitune.model.region import freeze_outside
from cofitune.recipes.train.metrics import Watch
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.train.resume import identity
from cofitune.reports.console import say
from cofitune.reports.training.progress import TrainProgress
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.retained import RetainedUpdate
from cofitune.softmask.update import mask_updates
from cofitune.training.engine import checkpoint_layers, start_engine
from cofitune.training.l2 import DecoupledL2SP
from cofitune.training.loop import FitSettings, StepRecord, fit
from cofitune.training.peft import insert_adapter
from cofitune.training.prefix_cache import Prefix, PrefixCache
from cofitune.training.signals import StopRequest
from cofitune.training.state import (
    save_state,
)
from cofitune.training.throughput import start_meter
from cofitune.training.unused_parameters import check_unused_parameters
from cofitune.zero import flats, inner_optimizer, shards


def make_ready(model: PreTrainedModel, config: Config, plan: TrainPlan) -> tuple[Any, RetainedUpdate | None, TrainPlan]:
    """Freeze what does not train, put an adapter, the soft mask or the pull to where they belong, start the engine.

    Returns:
        DeepSpeed's engine around the model, what measures the share of an update that the mask keeps, and the plan,
        which now knows what an adapter begins with.
    """
    if plan.adapter:
        plan = replace(plan, adapter_begins=insert_adapter(model, plan.adapter, config.train.seed))
    else:
        freeze_outside(model, set(plan.trained))
    if config.train.gradient_checkpointing:
        checkpoint_layers(model, plan.anatomy.layout.layers, plan.region.first)
    apply_to = config.softmask.apply_to
    kept = RetainedUpdate(plan.factors) if plan.factors else None
    on_gradient = plan.factors_on("gradient", apply_to)
    mask_gradients(model, on_gradient, kept if apply_to == "gradient" else None, plan.held)
    engine = start_engine(model, plan.settings)
    if on_update := plan.factors_on("update", apply_to):
        mask_updates(inner_optimizer(engine), shards(engine), on_update, kept if apply_to == "update" else None)
    if config.train.l2_to_base:  # after the mask, which then holds back the pull, too
        DecoupledL2SP(inner_optimizer(engine), flats(engine), config.train.l2_to_base)
    return engine, kept, plan


def take_steps(
    engine: Any,
    plan: TrainPlan,
    config: Config,
    folder: Path,
    console: Console,
    watch: Watch,
    done: int,
    stop_step: int | None = None,
    prefix: Prefix | None = None,
) -> None:
    """Train from step `done` on: on every step what is watched, and where it is due a checkpoint.

    Args:
        stop_step: the step after which to pause; None: the last one.
        prefix: keeps and gives activations of the frozen prefix; None: as `plan.prefix` says.

    Raises:
        Stopped: a signal ended it.
        UserError: training diverged, or a trained tensor takes no part in the loss.
    """
    if plan.data.tokenizer is None:
        raise RuntimeError("a dry run's plan cannot be trained")
    rank = torch.distributed.get_rank()
    saver = Saver(config, plan, folder, engine, done)
    # an adapter's FLOPs are not counted
    measured = start_meter(plan.anatomy, plan.region, plan.settings.dtype, plan.steps.world_size)
    meter = None if plan.adapter else measured
    if meter and torch.cuda.is_available() and meter.peak is None:
        say(console, f"no MFU: what a {meter.device_name} can do is not in our table")
    check_used = check_unused_parameters(engine.module)
    with TrainProgress(console, plan.steps.num_steps, visible=rank == 0, done=done) as progress:
        watch.begin(progress, done)

        def on_step(record: StepRecord, stopped_by: int) -> None:
            check_used()
            watch.after_step(record, stopped_by, saves=saver.is_due(record, stopped_by))
            saver.after_step(record, stopped_by)

        if plan.prefix and prefix is None:
            prefix = PrefixCache(engine.module, plan.prefix)
        settings = FitSettings(
            schedule=plan.steps,
            seed=config.train.seed,
            pad_token_id=plan.data.tokenizer.pad_token_id,
            start_step=done,
            stop_step=stop_step,
            rehearsal=plan.rehearsal.loss if plan.rehearsal else None,
        )
        with StopRequest(listens=config.train.save_steps is not None) as stop:
            try:
                stopped_by = fit(
                    engine, plan.examples, settings, on_step, prefix=prefix, meter=meter, asked=lambda: stop.signum
                )
            except UserError as error:
                raise UserError(f"{error} ({saver.resume_hint()})", everywhere=rank != 0) from error
    if stopped_by:
        raise Stopped(f"stopped by {signal.Signals(stopped_by).name}: {saver.resume_hint()}", stopped_by)


class Saver:
    """Writes a checkpoint every `save_steps`, at an epoch's end, and when the ranks stop."""

    def __init__(self, config: Config, plan: TrainPlan, folder: Path, engine: Any, done: int) -> None:
        self._train, self._num_steps, self._engine = config.train, plan.steps.num_steps, engine
        self._folder, self._identity = folder, identity(config, plan)
        self._last = done  # the step of the newest checkpoint; 0 without one

    def after_step(self, record: StepRecord, stopped_by: int) -> None:
        """Save where it is due. Every rank must call.

        The last step needs none: the delta is written at once.
        """
        if self.is_due(record, stopped_by):
            save_state(self._folder / "checkpoints", self._engine, record.step, self._identity, self._train.keep_last)
            self._last = record.step

    def is_due(self, record: StepRecord, stopped_by: int) -> bool:
        """Whether a step is to be saved."""
        every = self._train.save_steps
        if every is None or record.step == self._num_steps:
            return False
        return record.step % every == 0 or record.epoch.is_integer() or bool(stopped_by)

    def resume_hint(self) -> str:
        """What a message about a training that ended early says of the way back."""
        if not self._last:
            return "no checkpoint was written before"
        return f"the state after step {self._last} is in {self._folder / 'checkpoints'}; --resume goes on from it"
