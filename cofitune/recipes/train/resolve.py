"""From sections of the config to the parts of a training: its region, soft mask, prefix cache and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cofitune.config import schema
from cofitune.data.batches import Plan
from cofitune.errors import ArtifactError, UserError
from cofitune.importance_file import COLUMNS, ROWS, ImportanceFile, merge_importance, read_importance, read_reliability
from cofitune.model.anatomy import Anatomy
from cofitune.model.layouts import expand_modules
from cofitune.model.load import choose_dtype
from cofitune.model.region import (
    Region,
    check_present,
    layer_set,
    linear_region,
    match_region,
    resolve_region,
)
from cofitune.ranks import this_rank
from cofitune.recipes.from_config import base_config
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.reports.importance.table import remedy, unreliable
from cofitune.search.winner import FILE_NAME, read_winner
from cofitune.softmask.columns import build_column_factors, check_columns
from cofitune.softmask.factors import Factor, build_factors, check_masked, harden, shuffle_units
from cofitune.training.engine import EngineSettings
from cofitune.training.peft import AdapterPlan, plan_adapter
from cofitune.training.prefix_cache import SHARED_MEMORY, PrefixPlan, changing_prefix


def find_region(
    requested: schema.Region | str | None, anatomy: Anatomy, search_folder: Path, needs: Prerequisites, base: str | None
) -> Region:
    """The section `region`, or what a search has found.

    Args:
        search_folder: where `cofitune search` has left its winner, which `region: search` means.
        base: the base's fingerprint, of which the winner must be.

    Raises:
        UserError: it names no tensor of this model, or there is no winner.
    """
    if requested is None:
        raise RuntimeError("the schema lets no config without a region or an adapter through")
    if isinstance(requested, schema.Region):
        if requested.match is not None:
            region = match_region(requested.match, anatomy)
            check_present(region, anatomy)
            return region
        layers, modules = requested.layers or "", requested.modules or ()  # the schema fills them in
    else:
        layers, modules = read_winner(search_folder, base)
        needs.use("region", search_folder / FILE_NAME)
    anatomy.check_units("a region by layers and modules")
    region = resolve_region(layers, modules, anatomy.num_layers, anatomy.modules)
    check_present(region, anatomy)
    return region


def find_adapter(requested: schema.Adapter, anatomy: Anatomy) -> tuple[Region, AdapterPlan]:
    """The modules that carry an adapter, of all layers or of some, and the adapter.

    Raises:
        UserError: modules are named in a model whose layout is not known, or cannot carry an adapter.
    """
    depth = anatomy.num_layers
    # where there is no list of layers, all-linear has nothing to say which of them are meant
    layers = layer_set(requested.layers or "all", depth, "adapter.layers") if depth else ()
    if requested.carriers == ("all",) and (anatomy.unknown or not anatomy.is_whole):
        region = linear_region(anatomy, layers)
    else:
        anatomy.check_units("an adapter on modules, except all-linear,")
        region = Region(layers, expand_modules(requested.carriers, anatomy.modules, "adapter.modules"))
    check_present(region, anatomy, "adapter")
    adapter = plan_adapter(
        requested.kind,
        region,
        anatomy,
        r=requested.r,
        alpha=requested.alpha,
        dropout=requested.dropout,
        rslora=requested.rslora,
        effective_rank=requested.effective_rank,
    )
    return region, adapter


def masked_modules(softmask: schema.SoftMask, region: Region, anatomy: Anatomy) -> tuple[str, ...]:
    """The modules under the soft mask; empty without one.

    Raises:
        UserError: the region has none that a mask could lie on.
    """
    if softmask.apply_to == "none":
        return ()
    if not region.modules:
        raise UserError(
            "softmask.apply_to: region.match trains no tensor with units (heads, neurons, outputs) that a mask could "
            "lie on; set it to none"
        )
    modules = region.modules
    if softmask.modules is not None:
        modules = expand_modules(softmask.modules, anatomy.modules, "softmask.modules")
        check_masked(modules, region)
    if softmask.axis == COLUMNS:
        check_columns(modules, region, anatomy)
    return modules


def find_importance(
    folders: Sequence[Path], anatomy: Anatomy, needs: Prerequisites, base: str | None, axis: str = ROWS
) -> dict[str, Tensor]:
    """The importance vectors of the soft mask: unit kind → [L, units]; empty where a dry run lacks some.

    Empty on all ranks but the first, too, which tells the others when they have met.

    Args:
        folders: of `cofitune importance`; several are merged unit by unit.
        base: the base's fingerprint, of which they must be; None where a dry run has no weights to know it by.
        axis: `softmask.axis`, which units they must be of.

    Raises:
        ArtifactError: a folder has none, or those of another base or of other units.
    """
    if this_rank().rank:
        return {}
    sets = []
    for number, folder in enumerate(folders, start=1):
        try:
            read = _importance_in(folder, anatomy, base, axis)
        except ArtifactError as error:
            if (folder / "manifest.json").is_file():  # there, and not what is needed
                raise
            needs.lack(error)
            continue
        if read is not None:
            sets.append(read.vectors)
            noise = unreliable(read_reliability(read.manifest))
            if noise:
                figures = ", ".join(f"{kind.replace('_', ' ')} {r:.2f}" for kind, r in noise.items())
                needs.notes.append(
                    f"warning: the importance in {folder} is mostly noise (reliability: {figures}; 1 is best), and so "
                    f"is the soft mask made of it: {remedy(read.manifest.get('estimator'))}"
                )
            name = "importance" if len(folders) == 1 else f"importance {number}"
            needs.use(name, folder / "importance.safetensors", read.sha256)
    return merge_importance(sets) if len(sets) == len(folders) else {}


def _importance_in(folder: Path, anatomy: Anatomy, base: str | None, axis: str) -> ImportanceFile | None:
    if not (folder / "manifest.json").is_file():
        raise ArtifactError(
            f"softmask: no importance in {folder}; run `cofitune importance` with this config first, name its "
            "folder in softmask.importance, or set softmask.apply_to: none"
        )
    if base is None:
        return None
    read = read_importance(folder, anatomy, base)
    if read.axis != axis:
        holds = {ROWS: "heads, neurons and outputs", COLUMNS: "input columns"}
        makes = {ROWS: "fisher or kl_dropout", COLUMNS: "wanda"}
        raise ArtifactError(
            f"softmask.axis: {axis} needs an importance of {holds[axis]} (importance.estimator: {makes[axis]}), and "
            f"{folder} is of {holds[read.axis]}; set axis: {read.axis}, or name another in softmask.importance"
        )
    return read


def make_factors(
    softmask: schema.SoftMask,
    importance: dict[str, Tensor],
    region: Region,
    masked: tuple[str, ...],
    anatomy: Anatomy,
    seed: int,
) -> dict[str, Factor]:
    """The soft mask, or the control that stands in for it; `seed`: of the shuffled control."""
    if softmask.threshold is not None:
        importance = harden(importance, softmask.threshold)
    if softmask.control == "shuffled":
        importance = shuffle_units(importance, anatomy, seed)
    uniform = softmask.control == "uniform"
    build = build_column_factors if softmask.axis == COLUMNS else build_factors
    return build(importance, region, masked, anatomy, softmask.strength, uniform=uniform)


def checkpointed_layers(requested: bool | int | str, depth: int) -> int:
    """How many layers compute their activations again, at most, by the config.

    Args:
        requested: `train.gradient_checkpointing`; auto may be any number.
        depth: layers that the backward pass runs through.
    """
    if requested is True or requested == "auto":
        return depth
    return min(int(requested), depth)


def check_recomputation(requested: bool | int | str, anatomy: Anatomy) -> None:
    """Refuse `train.gradient_checkpointing` on a model that cannot recompute its activations.

    Raises:
        UserError: it is such a model.
    """
    if requested and requested != "auto" and not anatomy.can_recompute:
        raise UserError(
            f"train.gradient_checkpointing: model type {anatomy.model_type} cannot recompute its activations in "
            "transformers; set it to false"
        )


def check_zero_stage(stage: int | str, dtype: torch.dtype, apply_to: str, l2_to_base: float, holds_rows: bool) -> None:
    """Refuse what DeepSpeed's BF16_Optimizer cannot do.

    Args:
        apply_to: what the soft mask scales.
        holds_rows: whether a fused tensor trains in part.

    Raises:
        UserError: something hooks into the optimizer's step, under stage 1 in bfloat16.
    """
    hooks = {
        "softmask.apply_to: update": apply_to == "update",
        "train.l2_to_base": l2_to_base > 0,
        "a part of a fused tensor as region": holds_rows,
    }
    what = next((name for name, requested in hooks.items() if requested), None)
    if dtype == torch.bfloat16 and stage == 1 and what:
        raise UserError(
            f"deepspeed.zero_stage: 1 with bfloat16 runs DeepSpeed's BF16_Optimizer, under which {what} is not "
            "supported; use zero_stage: 2 or 3"
        )


def plan_prefix(
    kind: str, model: schema.Model, anatomy: Anatomy, first: int, lengths: Sequence[int], disk: Path
) -> PrefixPlan | None:
    """What `train.prefix_cache` will keep; None where there is nothing to keep.

    Args:
        kind: none | memory | disk.
        first: the lowest trained layer.
        lengths: tokens of each example.
        disk: the folder that `disk` means.

    Raises:
        UserError: the frozen layers would not give the same activations again, or there is no shared memory.
    """
    if kind == "none" or first == 0:
        return None
    reason = changing_prefix(base_config(model))
    if reason:
        raise UserError(f"train.prefix_cache: {kind} would not give the same loss: {reason}; set it to none")
    if not anatomy.modules:
        raise UserError(
            f"train.prefix_cache: {kind} needs to know what feeds a layer, and the layout of model type "
            f"{anatomy.model_type} is not known; set it to none"
        )
    folder = SHARED_MEMORY if kind == "memory" else disk
    if kind == "memory" and not folder.is_dir():
        raise UserError(f"train.prefix_cache: memory needs {folder}, which this machine does not have; use disk")
    dtype = choose_dtype(model.dtype)
    return PrefixPlan(anatomy.layout.layers, first, list(lengths), anatomy.hidden_size, dtype, folder)


def engine_settings(
    train: schema.Train, deepspeed: schema.DeepSpeed, dtype: torch.dtype, steps: Plan
) -> EngineSettings:
    """What DeepSpeed must know; a stage that is still to be chosen is 3."""
    return EngineSettings(
        zero_stage=3 if deepspeed.zero_stage == "auto" else deepspeed.zero_stage,
        offload_optimizer=deepspeed.offload_optimizer,
        offload_param=deepspeed.offload_param,
        raw=deepspeed.raw,
        dtype=dtype,
        micro_batch=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_betas=train.adam_betas,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_ratio=train.warmup_ratio,
        num_steps=steps.num_steps,
        rehearsal_micro_batches=steps.rehearsal_micro_batches,
        optimizer=train.optimizer,
        decay_all=train.decay_all,
    )
