"""`cofitune importance`: read general data, estimate what each unit matters to it, normalise, write the vectors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, distributed

from cofitune import __version__
from cofitune.config.schema import Config
from cofitune.data.batches import Batch, collate
from cofitune.data.chat import set_template
from cofitune.data.encoded import Encoding, Examples, encode_sources
from cofitune.data.read import Account
from cofitune.data.sources import OpenSource
from cofitune.errors import ArtifactError, UserError
from cofitune.files import gib, write_text
from cofitune.importance.estimate import KL_DROPOUT, PASSES_OF, Scores, estimate, memory_estimate, no_sums
from cofitune.importance.normalize import NORMALIZATIONS
from cofitune.importance.partial import load_sums, save_sums
from cofitune.model.anatomy import Anatomy
from cofitune.model.load import choose_dtype, fingerprint, load_tokenizer, weight_files
from cofitune.ranks import Rank, this_rank
from cofitune.recipes.folders import check_folder, start_folder
from cofitune.recipes.shared import base_anatomy, base_config, data_sources, load_base
from cofitune.reports.importance_table import importance_report, spread_csv
from cofitune.reports.plan import print_account
from cofitune.reports.plots import EXTRA, can_draw, draw_importance
from cofitune.training.engine import meeting
from cofitune.vectors import read_importance, unit_counts, write_importance

PARTIAL = "partial"  # folder of the ranks' sums while they are unfinished
LONGEST_WAIT = timedelta(hours=2)  # ranks meet once, at the end: the slowest may be far behind on an uneven machine


@dataclass(frozen=True)
class Plan:
    """All that is known before a weight is read: the items as tokens, the model's sizes, and what will be written."""

    folder: Path
    anatomy: Anatomy
    examples: Examples
    sources: tuple[OpenSource, ...]
    account: Account
    pad_token_id: int
    template: str
    batch_size: int
    passes: int
    memory: dict[str, int]

    @property
    def tokens(self) -> int:
        """Real tokens of all items, prompts included."""
        return int(self.examples.lengths.sum())

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches over all ranks."""
        return math.ceil(len(self.examples) / self.batch_size)

    def micro_batches(self, rank: Rank, done: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield a rank's micro-batches after the first `done`, with their index in the whole data, in its order."""
        for index in range(rank.rank + done * rank.world_size, self.num_micro_batches, rank.world_size):
            part = self.examples[index * self.batch_size : (index + 1) * self.batch_size]
            yield index, collate(part, self.pad_token_id)


def importance(
    config: Config, *, overwrite: bool = False, dry_run: bool = False, console: Console | None = None
) -> Path:
    """Estimate the importance of every unit for the general data and write it into `<output_dir>/importance`.

    On several ranks (a launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) each holds a whole
    model and takes every `WORLD_SIZE`-th micro-batch; rank 0 writes and talks.

    Args:
        config: reads its sections model, data and importance.
        overwrite: make a finished folder, or one of another config, anew.
        dry_run: print the plan and write nothing.
        console: where to talk; default: the terminal.

    Returns:
        The folder with `importance.safetensors`, `scores.safetensors` and `manifest.json`.

    Raises:
        UserError: anything that the user can mend. All but a model that does not fit is found before weights load.
    """
    rank = this_rank()
    console = (console or Console()) if rank.rank == 0 else Console(quiet=True)
    plan = make_plan(config, overwrite)
    if dry_run:
        _show_plan(plan, rank, console)
        return plan.folder
    if not overwrite and (plan.folder / "manifest.json").is_file():
        _check_finished(plan, config)
        console.print(f"{plan.folder} is finished already, with this config and this data (--overwrite makes it anew)")
        return plan.folder
    manifest = _manifest(plan, config)
    if overwrite:
        shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    print_account(console, plan.account)
    with _process_group(rank):
        scores = _estimate(plan, config, manifest, rank, console)
    normalize = NORMALIZATIONS[config.importance.normalized_by]
    vectors = {kind: normalize(values) for kind, values in scores.values.items()}
    if rank.rank == 0:
        start_folder(config, "importance", overwrite)
        write_importance(plan.folder, vectors, scores.values, manifest)
        shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
        console.print(importance_report(vectors))
        write_text(plan.folder / "spread.csv", spread_csv(vectors))
        _draw(plan, config, vectors, console)
        console.print(f"\n{scores.tokens:,} tokens of {len(plan.examples):,} items → {plan.folder}")
    return plan.folder


def make_plan(config: Config, overwrite: bool = False) -> Plan:
    """Read the data, the tokenizer and the model's sizes, and check everything that the user could have got wrong.

    Raises:
        UserError: no data is named, or a file, an item, the model or the output folder cannot be used.
    """
    wanted, model = config.importance, config.model
    if not wanted.data:
        raise UserError(
            "importance.data: names no data; give it general data, what the model should keep being able to do, for "
            "example importance: {data: [{path: data/general.jsonl}]}"
        )
    folder = check_folder(config, "importance", overwrite)
    anatomy = base_anatomy(model, base_config(model))
    weight_files(model.name, model.revision)
    tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    template = set_template(tokenizer, config.data.template)
    sources = data_sources(wanted.data)
    # the KL looks at whole conversations, so nothing needs the response to be told apart
    train_on = "all" if wanted.estimator == KL_DROPOUT else "response"
    encoding = Encoding(config.data.max_length, train_on, config.data.on_bad_item)
    encoded = encode_sources(sources, tokenizer, encoding, wanted.max_items)
    examples = Examples.chain(e.examples for e in encoded)
    longest = int(examples.lengths.max())
    size = choose_dtype(model.dtype).itemsize
    memory = memory_estimate(anatomy, size, wanted.per_device_batch_size, longest, PASSES_OF[wanted.estimator])
    return Plan(
        folder, anatomy, examples, tuple(e.opened for e in encoded), Account.total(e.account for e in encoded),
        tokenizer.pad_token_id, template, wanted.per_device_batch_size, PASSES_OF[wanted.estimator], memory,
    )  # fmt: skip


def _estimate(plan: Plan, config: Config, manifest: dict[str, Any], rank: Rank, console: Console) -> Scores:
    """Load the model onto this rank's device and run its share of the micro-batches under a progress bar.

    Its sums are saved on the way; an interrupted run goes on from them if nothing that they depend on has changed.
    """
    with console.status(f"loading {config.model.name}") if console.is_terminal else nullcontext():
        model = load_base(config.model).to(_device(rank))
    wanted = config.importance
    identity = json.dumps([manifest, config.model.attn_implementation, rank.world_size], sort_keys=True)
    path = plan.folder / PARTIAL / f"{rank.rank}-of-{rank.world_size}.safetensors"
    sums = load_sums(path, identity) or no_sums(plan.anatomy)
    if sums.micro_batches:
        console.print(f"going on after {sums.micro_batches} micro-batches of an interrupted run")
    total = len(range(rank.rank, plan.num_micro_batches, rank.world_size))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("micro-batches", total=total, completed=sums.micro_batches)

        def on_batch(_: int) -> None:
            progress.advance(bar)
            if sums.micro_batches % wanted.save_steps == 0:
                save_sums(path, sums, identity)

        return estimate(
            model,
            plan.micro_batches(rank, sums.micro_batches),
            dropout=wanted.dropout,
            seed=wanted.seed,
            estimator=wanted.estimator,
            reduce=wanted.reduced_by,
            sums=sums,
            on_batch=on_batch,
            anatomy=plan.anatomy,
        )


def _draw(plan: Plan, config: Config, vectors: dict[str, Tensor], console: Console) -> None:
    if not can_draw():
        console.print(f"no picture: pip install 'cofitune[{EXTRA}]' draws one", markup=False)
        return
    wanted = config.importance
    how = f"{wanted.estimator}, {wanted.reduced_by}, {wanted.normalized_by}"
    told = f"{Path(config.model.name).name}: {how}, {len(plan.examples):,} items"
    picture, _ = draw_importance(plan.folder, vectors, told)
    console.print(f"picture: {picture} (and .svg)", highlight=False, soft_wrap=True)


def _device(rank: Rank) -> torch.device:
    """The rank's own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank.device(torch.cuda.device_count()))


@contextmanager
def _process_group(rank: Rank) -> Iterator[None]:
    """Join the ranks, unless there is one only or whoever called us has joined them already."""
    device = _device(rank)
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


def _manifest(plan: Plan, config: Config) -> dict[str, Any]:
    wanted = config.importance
    return {
        "base": config.model.name,
        "base_fingerprint": fingerprint(config.model.name, config.model.revision),
        "model_type": plan.anatomy.model_type,
        "sizes": {"num_layers": plan.anatomy.num_layers, **unit_counts(plan.anatomy)},
        "dtype": str(choose_dtype(config.model.dtype)).removeprefix("torch."),
        "estimator": wanted.estimator,
        "reduce": wanted.reduced_by,
        "normalize": wanted.normalized_by,
        **({"dropout": wanted.dropout, "passes": wanted.passes} if wanted.estimator == KL_DROPOUT else {}),
        "seed": wanted.seed,
        "per_device_batch_size": wanted.per_device_batch_size,
        "items": len(plan.examples),
        "tokens": plan.tokens,
        "max_length": config.data.max_length,
        "template": plan.template,
        "data": [source.identity() for source in plan.sources],
        "cofitune": __version__,
    }


def _check_finished(plan: Plan, config: Config) -> None:
    """The config is the folder's own (`check_folder` saw to that): are the model and the data still the same, too?"""
    manifest = read_importance(
        plan.folder, plan.anatomy, fingerprint(config.model.name, config.model.revision)
    ).manifest
    before = {f["path"]: f["sha256"] for f in manifest.get("data", [])}
    changed = [s.source.path for s in plan.sources if before.get(s.source.path) != s.sha256]
    if changed:
        raise ArtifactError(
            f"{plan.folder} was made before {', '.join(changed)} changed; choose another output_dir, or --overwrite it"
        )


def _show_plan(plan: Plan, rank: Rank, console: Console) -> None:
    anatomy = plan.anatomy
    console.print(f"importance of {anatomy.model_type}: {anatomy.num_layers} layers × units", markup=False)
    for kind, units in unit_counts(anatomy).items():
        name = kind.replace("_", " ")
        console.print(f"  {name:<16} {units:>7,} a layer  {units * anatomy.num_layers:>10,} in all", highlight=False)
    longest = int(plan.examples.lengths.max())
    console.print(
        f"data     {len(plan.examples):,} items, {plan.tokens:,} tokens (longest {longest:,}), template "
        f"{plan.template}\n"
        f"work     {plan.num_micro_batches:,} micro-batches of {plan.batch_size} over {rank.world_size} rank(s), "
        f"{plan.passes} pass{'es' if plan.passes > 1 else ''} each",
        highlight=False,
    )
    parts = ", ".join(f"{name} {gib(size)}" for name, size in plan.memory.items())
    console.print(f"memory   about {gib(sum(plan.memory.values()))} on each device ({parts})", highlight=False)
    print_account(console, plan.account)
    pictures = ("importance.png", "importance.svg") if can_draw() else ()
    files = ("importance.safetensors", "scores.safetensors", "spread.csv", *pictures, "manifest.json", "config.yaml")
    console.print(f"writes   {plan.folder}/: {', '.join(files)}", highlight=False, soft_wrap=True)
