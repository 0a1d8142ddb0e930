"""`cofitune train`: load the model, freeze what lies outside the region, train under the soft mask, save the delta."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.config.schema import Config
from cofitune.distributed import check_agreement, device, run_on_rank_zero
from cofitune.errors import UserError
from cofitune.files import check_unlocked, exclusive
from cofitune.model.attention import check_device
from cofitune.ranks import is_launched, this_rank
from cofitune.recipes.folders import check_disk_space, check_folder
from cofitune.recipes.from_config import load_base
from cofitune.recipes.on_plan import OnPlan
from cofitune.recipes.summary import write_summary
from cofitune.recipes.train.manifest import make_manifest
from cofitune.recipes.train.metrics import DriftReached
from cofitune.recipes.train.plan import TrainPlan, plan_train
from cofitune.recipes.train.plan_report import fitted_sentence, plan_facts, print_plan
from cofitune.recipes.train.resume import (
    agreed,
    check_finished,
    check_resume,
    find_checkpoint,
    keep_stage,
    newest_readable,
    required_disk_bytes,
)
from cofitune.recipes.train.steps import PreparedModel, TrainRun, prepare_model, start_run, take_steps
from cofitune.reports.console import say
from cofitune.softmask.retained import kept_sentence
from cofitune.training.checkpoint_folders import checkpoint_folders, remove_checkpoints
from cofitune.training.delta import collect, write_delta
from cofitune.training.engine import release, sharded_loading, start_distributed
from cofitune.training.finite import check_all_finite
from cofitune.training.fit_device import ranks_a_node, smallest_device_bytes
from cofitune.training.hashing import hash_parameters
from cofitune.training.out_of_memory import explaining_out_of_memory
from cofitune.training.peft import base_names, merged_weights, write_adapter
from cofitune.training.state import load_state
from cofitune.training.state_check import find_newest


def train(
    config: Config,
    *,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    ranks: int = 1,
    on_plan: OnPlan | None = None,
) -> Path:
    """Train a region of a model and write the delta into `<output_dir>/train`.

    Runs on every rank; rank 0 alone talks and writes.

    Args:
        resume: continue from the newest whole checkpoint; without one, from the beginning.
        ranks: ranks that a dry run plans for; a run counts its own.
        on_plan: is told of a dry run's plan.

    Returns:
        The folder with delta.safetensors, manifest.json, metrics.jsonl and config.yaml.

    Raises:
        UserError: a mistake in the config or the data, found before anything is written; or the training diverged.
        Stopped: a signal ended it; its state is saved.
    """
    console = console or Console()
    world_size = this_rank().world_size if is_launched() else ranks
    plan = check(config, overwrite=overwrite, resume=resume, dry_run=dry_run, ranks=world_size)
    if not dry_run and not overwrite and (plan.folder / "manifest.json").is_file():
        say(console, f"{plan.folder}: already trained with this config and data; --overwrite trains it again")
        return plan.folder
    print_plan(plan, console)
    if dry_run:
        if on_plan:
            on_plan(plan_facts(plan))
        return plan.folder

    with explaining_out_of_memory(plan.footprint):
        start_distributed(config.train.ddp_timeout)
        check_device(config.model.attn_implementation, trains=True, on_gpu=torch.cuda.is_available())
        plan = fit_smallest(_as_rank_zero_found(plan), console)
    with explaining_out_of_memory(plan.footprint):
        check_agreement(agreed(plan))
        with ExitStack() as lock:
            run_on_rank_zero(lambda: lock.enter_context(exclusive(plan.folder, "training")))
            prepared = prepare_model(_load_base(plan), plan)
            _train(prepared, console, overwrite=overwrite, resume=resume)
        release(prepared.engine)
    return plan.folder


def check(
    config: Config, *, overwrite: bool = False, resume: bool = False, dry_run: bool = False, ranks: int = 1
) -> TrainPlan:
    """Resolve a training and find every mistake of the user's, writing nothing.

    Raises:
        UserError: the run is impossible, or was trained from other contents than the config's files have now.
    """
    if resume and overwrite:
        raise UserError("--resume continues a training and --overwrite starts it again: give one of them")
    finished = (config.run / "train" / "manifest.json").is_file()
    reached = None if finished or overwrite else newest_readable(config.run / "train")
    if not dry_run:
        check_unlocked(config.run / "train", "training")
    folder = check_folder(config, "train", overwrite, resumes=resume and reached is not None)
    if reached is not None and not (resume or dry_run):
        raise UserError(
            f"{folder} holds a checkpoint of step {reached.step}; --resume continues from it, --overwrite starts again"
        )
    damaged = [] if reached or finished or overwrite else checkpoint_folders(folder / "checkpoints")
    if damaged and not (resume or dry_run):
        raise UserError(
            f"{folder} holds checkpoints ({', '.join(path.name for path in damaged)}) and none of them can be read: "
            "each one's manifest is damaged; --resume, too, would begin anew, and --overwrite takes them away"
        )
    plan = keep_stage(plan_train(config, ranks, dry_run), reached if resume else None)
    first = this_rank().rank == 0  # the others do not know the importance yet
    if finished and not overwrite and first:
        check_finished(plan)
    if reached is not None and resume and not plan.missing and first:
        check_resume(plan, reached)
    if not dry_run:  # which tells what is needed and what is free, possibly on another machine
        if plan.prefix:
            plan.prefix.check_space()
        check_disk_space(folder, required_disk_bytes(plan))
    return plan


def _as_rank_zero_found(plan: TrainPlan) -> TrainPlan:
    """Take what rank 0 alone has looked for: a network file system shows other machines late what was just written."""
    factors, used, kept_stage = run_on_rank_zero(lambda: (plan.factors, plan.used, plan.kept_stage))
    return replace(plan, factors=factors, used=used, kept_stage=kept_stage)


def fit_smallest(plan: TrainPlan, console: Console) -> TrainPlan:
    """Choose what `auto` leaves open for the smallest device of all ranks. Collective: each rank knows its own."""
    fitted = plan.fitted(smallest_device_bytes(device()), ranks_a_node(device()))
    if fitted.resolved != plan.resolved:
        say(console, f"for the smallest device of all ranks: {fitted_sentence(fitted)}")
    return fitted


def _load_base(plan: TrainPlan) -> PreTrainedModel:
    """The base on this rank, sharded while it is read where it is big."""
    torch.manual_seed(plan.config.train.seed)
    whole = plan.adapter is not None and plan.adapter.needs_whole
    sharded = sharded_loading(plan.anatomy.num_parameters, plan.settings, plan.steps.world_size)
    with nullcontext() if whole else sharded:
        return load_base(plan.config.model, with_kernels=True)


def _train(prepared: PreparedModel, console: Console, *, overwrite: bool, resume: bool) -> None:
    """From the checkpoint on, if there is one: train, prove that nothing else changed, write the delta."""
    plan = prepared.plan
    checkpoint = find_checkpoint(plan, console) if resume else None
    held_out = plan.rehearsal.held_out if plan.rehearsal else None
    run = start_run(prepared, checkpoint, held_out, overwrite)
    before = _hash_frozen(run)
    reached: DriftReached | None = None
    try:
        take_steps(run, console)
    except DriftReached as error:
        reached = error
        _go_back(run, error, console)
    if torch.distributed.get_rank() == 0 and run.watch.records and (share := run.watch.records[-1].kept_share):
        say(console, kept_sentence(share, plan.config.softmask.apply_to))
    _prove_frozen(before, _hash_frozen(run), console)
    # every rank gathers; rank 0 has the tensors then
    tensors = merged_weights(run.model, plan.adapter) if plan.adapter else collect(run.model, plan.trained)
    run_on_rank_zero(lambda: check_all_finite(tensors))
    if plan.adapter:
        write_adapter(plan.folder / "adapter", run.model, plan.adapter, plan.config.model.name)

    def write() -> None:
        manifest = make_manifest(plan, before, tensors, run.watch, reached.record if reached else None)
        write_delta(plan.folder, tensors, manifest)
        write_summary(plan.config.run)
        say(console, f"wrote {plan.folder}/delta.safetensors: {len(tensors)} tensors")
        if not plan.config.train.keep_checkpoints:
            remove_checkpoints(plan.folder / "checkpoints")

    run_on_rank_zero(write)  # for which all wait, however long the disk takes


def _go_back(run: TrainRun, reached: DriftReached, console: Console) -> None:
    """Put the newest checkpoint back: none is written above `train.max_drift`. Every rank must call.

    Raises:
        UserError: the limit was exceeded before the first checkpoint.
    """
    record, limit = reached.record, reached.limit
    drift = "is not finite" if record.drift is None else f"is {max(record.drift, record.kl or 0.0):.4f}"
    output = f"drift {drift} at step {record.step}, above train.max_drift {limit:g}"

    result = find_newest(run.plan.folder / "checkpoints", partial(say, console))

    def agree() -> None:
        if result is None:
            raise UserError(
                f"{output}, and no checkpoint was written before; lower train.learning_rate, or set train.save_steps "
                f"below {record.step}"
            )
        check_resume(run.plan, result)

    run_on_rank_zero(agree)
    step = load_state(run.engine, result)
    run_on_rank_zero(lambda: run.watch.read(step))
    say(console, f"{output}: training ends with the checkpoint of step {step}")


def _hash_frozen(run: TrainRun) -> dict[str, str]:
    """sha256 of each tensor of the base, or held part of one, that does not train, by its name in the base."""
    model, plan = run.model, run.plan
    trained = set(plan.trained)
    inside = base_names(plan.adapter, (name for name in plan.anatomy.shapes if name not in trained))
    return {inside.get(name, name): digest for name, digest in hash_parameters(model, inside, plan.held).items()}


def _prove_frozen(before: dict[str, str], after: dict[str, str], console: Console) -> None:
    """Compare the frozen tensors' hashes from before the first step and after the last.

    Raises:
        RuntimeError: one changed, which is our bug.
    """
    changed = sorted(name for name in before if before[name] != after[name])
    if changed:
        raise RuntimeError(f"{len(changed)} frozen tensors changed during training: {', '.join(changed[:5])}")
    say(console, f"frozen: all {len(before)} tensors are unchanged, bit for bit (sha256)")
