"""The training of one trial: from the base, or from where it paused, to its next pause or end. It writes no delta."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from cofitune.distributed import check_agreement, device, run_on_rank_zero, world_size_or_one
from cofitune.recipes.folders import check_folder
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.train.resume import agreed, find_checkpoint, identity, keep_stage, newest_readable
from cofitune.recipes.train.steps import prepare_model, start_run, take_steps
from cofitune.recipes.trial.curve import CurveRecorder
from cofitune.recipes.trial.loss_items import LossItems
from cofitune.recipes.trial.prefix_cache import has_room
from cofitune.reports.console import say
from cofitune.search.measured import Curve
from cofitune.training.checkpoint_folders import remove_checkpoints
from cofitune.training.delta import collect
from cofitune.training.engine import release
from cofitune.training.fit_device import base_may_stay, smallest_device_bytes
from cofitune.training.out_of_memory import explaining_out_of_memory
from cofitune.training.prefix_cache import Prefix, around_shared, nothing_around
from cofitune.training.shared_base import HOST, SharedBase
from cofitune.training.shared_prefix_cache import SharedPrefix
from cofitune.training.state import save_state
from cofitune.training.state_files import Checkpoint
from cofitune.zero import free_engine

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What a trial's training, or a part of it, came to.

    Attributes:
        tensors: the trained ones whole, on the CPU of every rank, in the training dtype; none where losses are
            measured, since nothing is asked of them afterwards.
        seconds: of each optimizer step of this part.
        curve, margins: what was measured, where losses are.
        seconds_measuring: what that took in this part.
    """

    tensors: Tensors
    seconds: list[float]
    curve: Curve = ()
    margins: dict[str, float] = field(default_factory=dict)
    seconds_measuring: float = 0.0


def train_trial(
    base: SharedBase,
    plan: TrainPlan,
    console: Console,
    *,
    stop_step: int | None = None,
    saves: bool = True,
    shared: SharedPrefix | None = None,
    items: LossItems | None = None,
) -> Trained:
    """Train a model object of this trial's own, into `<output_dir>/train`. Every rank must call.

    The base stays on the device after it, for evaluations and other trials, where the training leaves room for that.

    Args:
        stop_step: the step after which it pauses; None, or the last one: it ends.
        saves: whether it leaves its state at a pause, so that a later call continues to the same bits.
        shared: what is kept of the frozen prefix, for other trials too.
        items: what losses are measured on while it trains; None: it is scored afterwards.

    Raises:
        UserError: the training diverged, or memory ran out.
    """
    folder = check_folder(plan.config, "train", overwrite=False, resumes=True)
    pauses = stop_step is not None and stop_step < plan.steps.num_steps
    torch.manual_seed(plan.config.train.seed)
    if items:  # measured by the recorder alone, at the search's own steps
        plan = replace(plan, data=replace(plan.data, validation=()))
    plan = keep_stage(plan, run_on_rank_zero(lambda: newest_readable(folder)))
    room = smallest_device_bytes(device())
    plan = plan.fitted(room)
    footprint = replace(plan.footprint, shared_base=base_may_stay(plan.footprint, room))
    if world_size_or_one() > 1:
        check_agreement(agreed(plan))
    with explaining_out_of_memory(footprint):
        model = _instantiate(base, plan, stays=footprint.shared_base)
        prepared = prepare_model(model, plan)
        plan, engine = prepared.plan, prepared.engine
        run = start_run(prepared, _reached(plan, stop_step, console), held_out=None)
        trains = run.start_step != stop_step
        prefix = _prefix(model, plan, shared, console, items) if trains else None  # it is checked before the first step
        around = around_shared(prefix, engine.device) if prefix and prefix.highest else nothing_around
        recorder = CurveRecorder(run, items, console, around) if items else None
        before = len(run.watch.records)
        if trains:
            callbacks = [recorder.after_step] if recorder else []
            take_steps(run, console, stop_step=stop_step, prefix=prefix, callbacks=callbacks)
            if pauses and saves:
                save_state(folder / "checkpoints", engine, int(stop_step or 0), identity(plan), save_total_limit=1)
        seconds = [record.seconds for record in run.watch.records[before:]]
        if recorder:
            margins = {} if pauses else recorder.margins()
            trained = Trained({}, seconds, recorder.curve(), margins, recorder.seconds)
        else:
            trained = Trained(collect(model, plan.region.parameter_names(plan.anatomy), everywhere=True), seconds)
        release(engine)
        free_engine(engine)
    if not pauses:
        run_on_rank_zero(lambda: remove_checkpoints(folder / "checkpoints"))
    return trained


def _instantiate(base: SharedBase, plan: TrainPlan, stays: bool) -> PreTrainedModel:
    """A model object around the base's weights; `stays`: whether the base is on the device, and stays there."""
    base.place(device() if stays else HOST)
    # where the engine moves or shares out weights it copies them; else it may write into what is held
    writes = plan.settings.zero_stage < 3 and (stays or device() == HOST)
    return base.instantiate(trains=plan.trained if writes else ())


def _reached(plan: TrainPlan, stop_step: int | None, console: Console) -> Checkpoint | None:
    """Where an earlier part of the trial paused; what lies beyond this part is of no use to it. Collective."""

    def look() -> bool:
        newest = newest_readable(plan.folder)
        if newest is not None and newest.step <= (stop_step or plan.steps.num_steps):
            return True
        remove_checkpoints(plan.folder / "checkpoints")
        return False

    return find_checkpoint(plan, console) if run_on_rank_zero(look) else None


def _prefix(
    model: PreTrainedModel, plan: TrainPlan, shared: SharedPrefix | None, console: Console, items: LossItems | None
) -> Prefix | None:
    if shared is None or plan.region.first == 0:
        return None
    keep, message = has_room(shared, plan, items)
    say(console, message)
    return shared.of_training(model, plan.anatomy.layout.layers, plan.region.first, keep)
