"""The training of one trial: from the base, or from where it paused, to its next pause or end. It writes no delta."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from cofitune.config.schema import Config
from cofitune.distributed import run_on_rank_zero
from cofitune.recipes.folders import check_folder, start_folder
from cofitune.recipes.train.metrics import Watch
from cofitune.recipes.train.plan import TrainPlan, footprint
from cofitune.recipes.train.resume import find_checkpoint, identity, newest_readable
from cofitune.recipes.train.steps import make_ready, take_steps
from cofitune.recipes.trial.prefix_cache import has_room
from cofitune.reports.console import say
from cofitune.training.delta import collect
from cofitune.training.engine import release
from cofitune.training.out_of_memory import explaining_out_of_memory
from cofitune.training.prefix_cache import Prefix
from cofitune.training.shared_prefix_cache import SharedPrefix
from cofitune.training.state import Checkpoint, load_state, save_state
from cofitune.zero import free_engine

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What a trial's training, or a part of it, came to.

    Attributes:
        tensors: the trained ones whole, on the CPU of every rank, in the training dtype.
        seconds: of each optimizer step of this part.
    """

    tensors: Tensors
    seconds: list[float]


def train_trial(
    model: PreTrainedModel,
    config: Config,
    plan: TrainPlan,
    stop_step: int | None,
    saves: bool,
    shared: SharedPrefix | None,
    console: Console,
) -> Trained:
    """Train a model object that is this trial's own, into `<output_dir>/train`. Every rank must call.

    Args:
        stop_step: the step after which it pauses; None, or the last one: it ends.
        saves: whether it leaves its state at a pause, so that a later call goes on to the same bits.
        shared: what is kept of the frozen prefix, for other trials too.

    Raises:
        UserError: the training diverged, or memory ran out.
    """
    folder = check_folder(config, "train", overwrite=False, resumes=True)
    pauses = stop_step is not None and stop_step < plan.steps.num_steps
    torch.manual_seed(config.train.seed)
    with explaining_out_of_memory(footprint(plan, config, plan.steps.world_size)):
        engine, kept, plan = make_ready(model, config, plan)
        checkpoint = run_on_rank_zero(lambda: _reached(config, plan, folder, stop_step, console))
        done = load_state(engine, checkpoint)
        watch = Watch(config, plan.data, plan.steps.num_steps, engine, folder, kept)

        def start() -> None:
            start_folder(config, "train", overwrite=False, resumes=done > 0)
            watch.read(done)

        run_on_rank_zero(start)
        before = len(watch.records)
        if done != stop_step:
            prefix = _prefix(model, config, plan, shared, console)
            take_steps(engine, plan, config, folder, console, watch, done, stop_step, prefix)
            if pauses and saves:
                save_state(folder / "checkpoints", engine, int(stop_step or 0), identity(config, plan), keep_last=1)
        tensors = collect(model, plan.region.parameter_names(plan.anatomy), everywhere=True)
        release(engine)
        free_engine(engine)
    if not pauses:
        run_on_rank_zero(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
    return Trained(tensors, [record.seconds for record in watch.records[before:]])


def _reached(
    config: Config, plan: TrainPlan, folder: Path, stop_step: int | None, console: Console
) -> Checkpoint | None:
    """Where an earlier part of the trial paused; what lies beyond this part is of no use to it."""
    newest = newest_readable(folder)
    if newest is not None and newest.step <= (stop_step or plan.steps.num_steps):
        return find_checkpoint(config, plan, folder, console)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return None


def _prefix(
    model: PreTrainedModel, config: Config, plan: TrainPlan, shared: SharedPrefix | None, console: Console
) -> Prefix | None:
    if shared is None or plan.region.first == 0:
        return None
    keep, message = has_room(shared, plan, config)
    say(console, message)
    return shared.of_training(model, plan.anatomy.layout.layers, plan.region.first, keep)
