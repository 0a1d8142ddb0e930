"""From sections of the config to the parts of a training: its region, soft mask, prefix cache and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cofitune.config import schema
from cofitune.data.batches import Plan
from cofitune.errors import UserError
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
from cofitune.recipes.from_config import base_config
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.search.winner import FILE_NAME, read_winner
from cofitune.training.engine import EngineSettings
from cofitune.training.peft import AdapterPlan, plan_adapter
from cofitune.training.prefix_cache import SHARED_MEMORY, PrefixPlan, changing_prefix


def find_trained(
    requested: schema.Region | str | None,
    adapter: schema.Adapter | None,
    search_folder: Path,
    anatomy: Anatomy,
    needs: Prerequisites,
    base: str | None,
) -> tuple[Region, AdapterPlan | None]:
    """What trains: a region, or an adapter and the region that carries it.

    Args:
        requested, adapter: the sections `region` and `adapter`.
        search_folder: where `cofitune search` leaves its winner, which `region: search` means.
        base: the base's fingerprint, of which a search's winner must be.

    Raises:
        UserError: it names no tensor of this model or none that can carry an adapter, or there is no winner.
    """
    if adapter is not None:
        return _find_adapter(adapter, anatomy)
    return _find_region(requested, anatomy, search_folder, needs, base), None


def _find_region(
    requested: schema.Region | str | None, anatomy: Anatomy, search_folder: Path, needs: Prerequisites, base: str | None
) -> Region:
    """The section `region`, or what `cofitune search` has left in its folder, which `region: search` means."""
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


def _find_adapter(requested: schema.Adapter, anatomy: Anatomy) -> tuple[Region, AdapterPlan]:
    """The modules that carry an adapter, of all layers or of some, and the adapter."""
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
