"""The steps of a training: the model made ready for its region and mask, then step after step, all of it watched."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.data.batches import collate
from cofitune.distributed import run_on_rank_zero
from cofitune.errors import Stopped, UserError
from cofitune.model.region import freeze_outside
from cofitune.model.varlen import attend_by_conversation
from cofitune.recipes.folders import start_folder
from cofitune.recipes.train.metrics import Watch
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.train.resume import identity
from cofitune.reports.console import say
from cofitune.reports.training.progress import TrainProgress
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.retained import RetainedUpdate
from cofitune.softmask.update import mask_updates
from cofitune.training.drift import HeldOut
from cofitune.training.engine import ELEMENTS_AT_ONCE, checkpoint_layers, start_engine
from cofitune.training.fused import fuse_operations
from cofitune.training.l2 import DecoupledL2SP
from cofitune.training.layer_input import check_replay
from cofitune.training.loop import FitSettings, StepRecord, fit
from cofitune.training.loss import summed_loss
from cofitune.training.peft import insert_adapter
from cofitune.training.prefix_cache import Prefix, PrefixCache
from cofitune.training.signals import StopRequest
from cofitune.training.state import load_state, save_state
from cofitune.training.state_files import Checkpoint
from cofitune.training.throughput import Meter, start_meter
from cofitune.training.unused_parameters import check_unused_parameters
from cofitune.zero import flats, inner_optimizer, shards

if TYPE_CHECKING:
    from cofitune.zero import Engine

StepCallback = Callable[[StepRecord, int], None]  # gets a step's record, and the signal that ended the training, or 0


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to train. Every rank has one.

    Attributes:
        plan: of its training; it knows what an adapter begins with.
        engine: DeepSpeed's, around the model.
        retained: measures the share of an update that the soft mask leaves; None without a mask.
    """

    plan: TrainPlan
    model: PreTrainedModel
    engine: Engine
    retained: RetainedUpdate | None


@dataclass(frozen=True)
class TrainRun:
    """A training on its way. Every rank has one.

    Attributes:
        start_step: optimizer steps that were taken before this call.
        watch: tells and writes each step's figures.
        saver: writes the checkpoints.
    """

    plan: TrainPlan
    model: PreTrainedModel
    engine: Engine
    start_step: int
    watch: Watch
    saver: Saver


def prepare_model(model: PreTrainedModel, plan: TrainPlan) -> PreparedModel:
    """Freeze what does not train, put an adapter, the soft mask or the pull to where they belong, start the engine."""
    config = plan.config
    if plan.adapter:
        plan = replace(plan, adapter_begins=insert_adapter(model, plan.adapter, config.train.seed))
    else:
        freeze_outside(model, set(plan.trained))
    if plan.varlen:
        attend_by_conversation(model)
    layers, first = plan.anatomy.layout.layers, plan.region.first
    checkpoint_layers(model, layers, first, plan.checkpointed)
    fuse_operations(model, layers, first + plan.checkpointed)
    apply_to = config.softmask.apply_to
    retained = RetainedUpdate(plan.factors) if plan.factors else None
    # the gradient is masked as it arrives at each parameter, before DeepSpeed reduces and clips it
    mask_gradients(model, plan.factors_on("gradient"), retained if apply_to == "gradient" else None, plan.held)
    engine = start_engine(model, plan.settings)
    # the update is masked inside the optimizer's step, on the shards that this rank owns
    if on_update := plan.factors_on("update"):
        kept = retained if apply_to == "update" else None
        at_once = ELEMENTS_AT_ONCE if plan.settings.zero_stage < 3 else None  # stage 3 has sub-groups of its own
        mask_updates(inner_optimizer(engine), shards(engine), on_update, kept, at_once)
    if config.train.l2_to_base:  # after the mask, which then holds back the pull, too
        DecoupledL2SP(inner_optimizer(engine), flats(engine), config.train.l2_to_base)
    return PreparedModel(plan, model, engine, retained)


def start_run(
    prepared: PreparedModel, checkpoint: Checkpoint | None, held_out: HeldOut | None, overwrite: bool = False
) -> TrainRun:
    """Continue from a checkpoint, if there is one, and make the folder ready. Every rank must call.

    Args:
        checkpoint: on rank 0, which alone reads; None: the training begins.
        held_out: what drift is measured on; None: it is not measured.
        overwrite: empty the folder first.
    """
    plan = prepared.plan
    start_step = load_state(prepared.engine, checkpoint)
    saver = Saver(plan, prepared.engine, start_step)
    watch = Watch(plan, prepared.engine, prepared.retained, held_out, saver.is_due)

    def start() -> None:  # only now: a model that does not load leaves no run behind, and an old one where it was
        start_folder(plan.config, "train", overwrite, resumes=start_step > 0)
        watch.read(start_step)

    run_on_rank_zero(start)
    return TrainRun(plan, prepared.model, prepared.engine, start_step, watch, saver)


def take_steps(
    run: TrainRun,
    console: Console,
    *,
    stop_step: int | None = None,
    prefix: Prefix | None = None,
    callbacks: Sequence[StepCallback] = (),
) -> None:
    """Train from the run's first step on: each step is watched, and saved where that is due. Every rank must call.

    Args:
        stop_step: the step after which to pause; None: the last one.
        prefix: keeps and gives activations of the frozen prefix; None: as the plan says.
        callbacks: are told of each step after it was watched and saved.

    Raises:
        Stopped: a signal ended it.
        UserError: training diverged, or a trained tensor takes no part in the loss.
    """
    plan, watch, saver = run.plan, run.watch, run.saver
    if plan.data.tokenizer is None:
        raise RuntimeError("a dry run's plan cannot be trained")
    rank = torch.distributed.get_rank()
    settings = FitSettings(
        schedule=plan.steps,
        seed=plan.config.train.seed,
        pad_token_id=plan.data.tokenizer.pad_token_id,
        start_step=run.start_step,
        stop_step=stop_step,
        rehearsal=plan.rehearsal.loss if plan.rehearsal else None,
        lengths=plan.lengths,
    )
    meter = _start_meter(plan, console)
    check_used = check_unused_parameters(run.engine.module)
    with TrainProgress(console, plan.steps.num_steps, visible=rank == 0, done=run.start_step) as progress:
        watch.begin(progress, run.start_step)

        def on_step(record: StepRecord, stopped_by: int) -> None:
            check_used()  # a tensor without a gradient would stay as it is, and nobody would notice
            watch.after_step(record, stopped_by)  # before the save: above max_drift none is written
            saver.after_step(record, stopped_by)
            for callback in callbacks:
                callback(record, stopped_by)

        setting = "train.prefix_cache" if prefix is None else "search.prefix_cache"
        if plan.prefix and prefix is None:
            prefix = PrefixCache(run.engine.module, plan.prefix)
        if prefix:
            _check_prefix(run, prefix, setting)
        with StopRequest(listens=plan.config.train.save_steps is not None) as stop:
            try:
                stopped_by = fit(
                    run.engine, plan.examples, settings, on_step, prefix=prefix, meter=meter, asked=lambda: stop.signum
                )
            except UserError as error:
                raise UserError(f"{error} ({saver.resume_hint()})", everywhere=rank != 0) from error
    if stopped_by:
        raise Stopped(f"stopped by {signal.Signals(stopped_by).name}: {saver.resume_hint()}", stopped_by)


def _check_prefix(run: TrainRun, prefix: Prefix, setting: str) -> None:
    """Raise a UserError where the model would not begin above its frozen layers with the same."""
    if prefix.highest is None:
        return
    engine, pad = run.engine, run.plan.data.tokenizer.pad_token_id if run.plan.data.tokenizer else 0
    item = {name: tensor.to(engine.device) for name, tensor in collate([run.plan.examples[0]], pad).items()}
    check_replay(engine, prefix.highest, lambda: summed_loss(engine, item), setting)


def _start_meter(plan: TrainPlan, console: Console) -> Meter | None:
    """What counts a step's FLOPs; None under an adapter, whose FLOPs are not counted."""
    if plan.adapter:
        return None
    meter = start_meter(plan.anatomy, plan.region, plan.settings.dtype, plan.steps.world_size)
    if torch.cuda.is_available() and meter.peak is None:
        say(console, f"no MFU: what a {meter.device_name} can do is not in our table")
    return meter


class Saver:
    """Writes a checkpoint every `save_steps`, at an epoch's end, and when the ranks stop."""

    def __init__(self, plan: TrainPlan, engine: object, start_step: int) -> None:
        self._train, self._num_steps, self._engine = plan.config.train, plan.steps.num_steps, engine
        self._folder, self._identity = plan.folder / "checkpoints", identity(plan)
        self._last = start_step  # the step of the newest checkpoint; 0 without one

    def after_step(self, record: StepRecord, stopped_by: int) -> None:
        """Save where it is due. Every rank must call.

        The last step needs none: the delta is written at once.
        """
        if self.is_due(record, stopped_by):
            save_state(self._folder, self._engine, record.step, self._identity, self._train.save_total_limit)
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
        return f"the state after step {self._last} is in {self._folder}; --resume continues from it"
