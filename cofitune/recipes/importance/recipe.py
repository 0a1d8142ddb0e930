"""`cofitune importance`: read general data, estimate what each unit matters to it, normalise, write the vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, distributed
from transformers import PreTrainedModel

from cofitune.config.day import keep_day, today
from cofitune.config.schema import Config
from cofitune.distributed import LONGEST_WAIT, all_reduce_max, check_agreement, device_of, run_on_rank_zero
from cofitune.errors import install
from cofitune.files import check_unlocked, exclusive, write_text
from cofitune.host_memory import keep_freed_memory
from cofitune.importance.estimate import WANDA, estimate, no_sums
from cofitune.importance.normalize import NORMALIZATIONS, over_own_units
from cofitune.importance.partial import load_sums, save_sums, sums_path
from cofitune.importance.reliability import reliability
from cofitune.importance.sums import Scores
from cofitune.importance_file import Reliability, layer_units, reliability_entry, write_importance
from cofitune.model.load import choose_dtype
from cofitune.ranks import Rank, is_launched, this_rank
from cofitune.recipes.folders import start_folder
from cofitune.recipes.from_config import load_base
from cofitune.recipes.importance.plan import (
    PARTIAL,
    ImportancePlan,
    agreed,
    check_finished,
    explaining_out_of_memory,
    identity_of,
    make_manifest,
    plan_importance,
)
from cofitune.recipes.importance.plan_report import plan_facts, print_plan
from cofitune.recipes.on_plan import OnPlan
from cofitune.recipes.own_files import remove_own, remove_partial
from cofitune.reports.console import say, show_status
from cofitune.reports.figure import EXTRA, can_draw, write_picture
from cofitune.reports.importance.plot import importance_picture
from cofitune.reports.importance.table import importance_report, reliability_text, spread_csv
from cofitune.reports.training.plan import print_account
from cofitune.training.engine import meeting, release, start_distributed
from cofitune.training.frozen import share_frozen
from cofitune.training.memory import gathered_at_once

# ranks with whole models meet once, at the end: the slowest may be far behind on an uneven machine
WHAT = "estimation of importance"  # in messages


def importance(
    config: Config,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    ranks: int = 1,
    on_plan: OnPlan | None = None,
) -> Path:
    """Estimate the importance of every unit for the general data and write it into `<output_dir>/importance`.

    On several ranks (a launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) each takes every
    `WORLD_SIZE`-th micro-batch, and holds a whole model or, where that does not fit its device, shares one with the
    others under ZeRO-3; rank 0 writes and talks.

    Args:
        config: reads its sections model, data and importance.
        overwrite: make a finished folder, or one of another config, again. What was interrupted on the way continues,
            with or without it.
        dry_run: print the plan and write nothing.
        console: where to talk; default: the terminal.
        ranks: ranks that a dry run plans for; a run counts its own.
        on_plan: is told of a dry run's plan.

    Returns:
        The folder with `importance.safetensors`, `scores.safetensors` and `manifest.json`.

    Raises:
        UserError: anything that the user can mend. All but a model that does not fit is found before weights load.
    """
    rank = this_rank() if is_launched() else Rank(world_size=ranks)
    console = (console or Console()) if rank.rank == 0 else Console(quiet=True)
    plan = plan_importance(config, overwrite, rank)
    if dry_run:
        print_plan(plan, rank, console)
        if on_plan:
            on_plan(plan_facts(plan, rank))
        return plan.folder
    if not (overwrite or plan.interrupted) and (plan.folder / "manifest.json").is_file():
        check_finished(plan)
        message = f"{plan.folder} is finished already, with this config and this data (--overwrite makes it again)"
        say(console, message)
        return plan.folder
    print_account(console, plan.account)
    with ExitStack() as lock:
        with _process_group(rank, plan.sharding.sharded), explaining_out_of_memory(plan):
            check_agreement(agreed(plan))

            def take_lock() -> None:
                lock.enter_context(exclusive(plan.folder, WHAT))

            if distributed.is_initialized():
                run_on_rank_zero(take_lock)
            else:
                take_lock()
            scores = _estimate(plan, rank, console)
        if rank.rank == 0:
            _write(plan, scores, overwrite, console)
    return plan.folder


def check(config: Config, overwrite: bool, ranks: int) -> ImportancePlan:
    """The plan for so many ranks that will be started, unless another process estimates here.

    Raises:
        UserError: one does; or as `plan_importance`.
    """
    check_unlocked(config.run / "importance", WHAT)
    return plan_importance(config, overwrite, Rank(world_size=ranks))


def _write(plan: ImportancePlan, scores: Scores, overwrite: bool, console: Console) -> None:
    """Normalise the scores, show the vectors and write them."""
    normal = NORMALIZATIONS[plan.config.importance.normalized_by]
    units = {kind: layer_units(plan.anatomy, kind) for kind in scores.halves}
    normalize = {kind: over_own_units(normal, counts) for kind, counts in units.items()}
    raw = {kind: over_own_units(Tensor.clone, units[kind])(values) for kind, values in scores.values.items()}
    vectors = {kind: normalize[kind](values) for kind, values in scores.values.items()}
    reliable = reliability(scores.halves, normalize, scores.micro_batches)
    if overwrite or plan.interrupted:  # the sums stay until the new vectors are there
        remove_own(plan.folder, "importance", keep=(PARTIAL, "config.yaml"))
    start_folder(plan.config, "importance", overwrite=False, resumes=True)  # whose it is was checked before
    console.print(importance_report(vectors))
    say(console, reliability_text(reliable, plan.config.importance.estimator))
    write_text(plan.folder / "spread.csv", spread_csv(vectors, reliable))
    _draw(plan, vectors, reliable, console)
    # last: its manifest calls the folder finished
    write_importance(plan.folder, vectors, raw, make_manifest(plan) | reliability_entry(reliable))
    remove_partial(plan.folder)
    say(console, f"\n{scores.tokens:,} tokens of {plan.num_items:,} items → {plan.folder}")


def _estimate(plan: ImportancePlan, rank: Rank, console: Console) -> Scores:
    """Load the model and run this rank's share of the micro-batches under a progress bar.

    Its sums are saved on the way; an interrupted run continues from them if nothing that they depend on has changed.
    """
    device, config = device_of(rank), plan.config
    # what fits one rank's device may not fit another's
    sharded = bool(all_reduce_max(int(plan.sharding.sharded), device))
    identity = identity_of(plan)
    path = sums_path(plan.partial, rank.rank, rank.world_size, sharded)
    sums = load_sums(path, identity) or no_sums(plan.anatomy, config.importance.estimator)
    if sums.micro_batches:
        say(console, f"continuing after {sums.micro_batches} micro-batches of an interrupted run")
    if sharded:
        say(console, f"{rank.world_size} ranks share the weights (ZeRO-3)")
    total = len(range(rank.rank, len(plan.batches), rank.world_size))
    left = total - sums.micro_batches
    loading = show_status(console, f"loading {config.model.name}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
    with _model(plan, device, sharded, loading) as model, progress:
        bar = progress.add_task("micro-batches", total=total, completed=sums.micro_batches)

        def on_batch(_: int) -> None:
            progress.advance(bar)
            if sums.micro_batches % config.importance.save_steps == 0:
                save_sums(path, sums, identity)
                keep_day(config.run, config.data.date or today())  # the sums are of items under this day's template

        return estimate(
            model,
            plan.micro_batches(rank, sums.micro_batches),
            plan.settings,
            sums=sums,
            on_batch=on_batch,
            anatomy=plan.anatomy,
            idle=all_reduce_max(left, device) - left if sharded else 0,
        )


@contextmanager
def _model(
    plan: ImportancePlan, device: torch.device, sharded: bool, loading: AbstractContextManager[object]
) -> Iterator[PreTrainedModel]:
    """The base on this rank's device: whole, or its share of it."""
    base, trains = plan.config.model, plan.config.importance.estimator != WANDA
    if device.type == "cpu":
        keep_freed_memory()
    if not sharded:
        with loading:
            model = load_base(base, trains=trains).to(device)
        yield model
        return
    with loading:
        load = partial(load_base, base, trains=trains)
        engine = share_frozen(load, choose_dtype(base.dtype), gathered_at_once(plan.anatomy))
    try:
        yield engine.module
    finally:
        release(engine)


def _draw(
    plan: ImportancePlan, vectors: dict[str, Tensor], reliable: Mapping[str, Reliability], console: Console
) -> None:
    if not can_draw():
        say(console, f"no picture: matplotlib is not installed ({install(EXTRA)})")
        return
    requested, model = plan.config.importance, plan.config.model.name
    how = f"{requested.estimator}, {requested.reduced_by}, {requested.normalized_by}"
    message = f"{Path(model).name}: {how}, {plan.num_items:,} items"
    picture, _ = write_picture(plan.folder, importance_picture("importance", vectors, message, reliable))
    say(console, f"picture: {picture} (and .svg)")


@contextmanager
def _process_group(rank: Rank, sharded: bool) -> Iterator[None]:
    """Join the ranks, unless there is one only or whoever called us has joined them already."""
    if sharded:  # DeepSpeed keeps its groups for the life of the process
        start_distributed()
        yield
        return
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank.world_size == 1 or distributed.is_initialized():
        yield
        return
    with meeting():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        distributed.destroy_process_group()
