"""Everything about a training run that can be known, and refused, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from cofitune.config.schema import Config
from cofitune.data.batches import Plan, plan_steps
from cofitune.data.chat import Example
from cofitune.errors import ArtifactError, UserError
from cofitune.files import sha256_file
from cofitune.importance_file import merge_importance, read_importance
from cofitune.model.anatomy import Anatomy
from cofitune.model.layouts import expand_modules
from cofitune.model.load import choose_dtype
from cofitune.model.region import Region, match_region, resolve_region
from cofitune.model.weight_files import check_files, fingerprint, weight_files
from cofitune.recipes.from_config import base_anatomy, base_config
from cofitune.recipes.train.data import TrainData, read_train_data
from cofitune.recipes.train.rehearsal import Joined, Rehearsed, read_rehearsed
from cofitune.search.winner import FILE_NAME, read_winner
from cofitune.softmask.factors import Factor, build_factors, check_masked, freeze_factors, join, shuffle_units
from cofitune.training.engine import EngineSettings
from cofitune.training.monitor import check_usable
from cofitune.training.out_of_memory import Footprint
from cofitune.training.peft import AdapterPlan, plan_adapter
from cofitune.training.prefix_cache import SHARED_MEMORY, PrefixPlan, changing_prefix
from cofitune.training.state import BYTES_A_WEIGHT


@dataclass(frozen=True)
class TrainPlan:
    """A run, resolved.

    Attributes:
        masked: modules under the soft mask, empty without one.
        factors: parameter name → soft-mask factor.
        held: fused tensor's name → factor 0 on its rows that do not train, where it trains in part.
        used: artifacts that the run stands on: what, where, sha256.
        prefix: what the prefix cache will keep; None without one.
        base_fingerprint: None where a dry run has nothing to know it by.
        rehearsal: the base's own answers, to train on beside the items, and to measure drift on; None without any.
        missing: what a dry run could not find but the run will need.
        region: what trains; under an adapter the modules that carry it, of all layers, which merging will change.
        adapter_begins: hash of what an OSF adapter begins with, known once it is in the model.
    """

    anatomy: Anatomy
    region: Region
    masked: tuple[str, ...]
    factors: dict[str, Factor]
    held: dict[str, Factor]
    settings: EngineSettings
    used: dict[str, dict[str, str]]
    data: TrainData
    steps: Plan
    prefix: PrefixPlan | None
    base_fingerprint: str | None
    missing: tuple[str, ...] = ()
    adapter: AdapterPlan | None = None
    adapter_begins: str | None = None
    rehearsal: Rehearsed | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """All that is trained on: the items (or packs of them), and behind them those of the rehearsal."""
        return Joined(self.data.examples, self.rehearsal.examples) if self.rehearsal else self.data.examples

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return _lengths(self.data, self.rehearsal)

    @property
    def delta_bytes(self) -> int:
        """Size of delta.safetensors."""
        return self.region.num_touched(self.anatomy) * self.settings.dtype.itemsize

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint."""
        trained = self.adapter.num_parameters if self.adapter else self.region.num_touched(self.anatomy)
        return trained * BYTES_A_WEIGHT

    @property
    def num_trained(self) -> int:
        """Weights that may move: the region's, or the adapter's own."""
        return self.adapter.num_parameters if self.adapter else self.region.num_parameters(self.anatomy)

    @property
    def trained(self) -> list[str]:
        """Names of the model's own parameters that train, wholly or in part; under an adapter none does."""
        return [] if self.adapter else self.region.parameter_names(self.anatomy)

    def factors_on(self, what: str, apply_to: str) -> dict[str, Factor]:
        """What multiplies the gradient, or the update: held rows have 0 on both, the soft mask lies on one of them."""
        return join(self.held, self.factors if apply_to == what else {})


def plan_training(
    config: Config, world_size: int, dry_run: bool = False, known_data: TrainData | None = None
) -> TrainPlan:
    """Resolve a run and find every mistake of the user's in it.

    A dry run also plans a model of which only config.json is at hand: it says what is missing, and leaves unknown what
    hangs on it.

    Args:
        known_data: what was read before by the same sections `model` and `data`; None: it is read now.

    Raises:
        UserError: the first thing that would make the run impossible or not what the config says.
    """
    check_usable(config.train.report_to)
    model_config = base_config(config.model)
    anatomy = base_anatomy(config.model, model_config)
    missing: list[str] = []
    base_fingerprint = _check_weights(config, anatomy, dry_run, missing)
    used: dict[str, dict[str, str]] = {}
    region = _region(config, anatomy, base_fingerprint, used)
    adapter = _adapter(config, region, anatomy)
    masked = _masked_modules(config, region, anatomy)
    held = freeze_factors(region, anatomy)
    _check_sharding(config, bool(held))
    importance = _importance(config, anatomy, base_fingerprint, dry_run, missing, used) if masked else {}
    factors = _factors(config, importance, region, masked, anatomy) if importance else {}
    data = known_data or read_train_data(config, model_config, dry_run, missing)
    train = config.train
    batch = (train.per_device_train_batch_size, train.gradient_accumulation_steps, world_size)
    flat = config.data.packing and config.model.attn_implementation == "flash_attention_2"
    rehearsal = read_rehearsed(config, data, base_fingerprint, dry_run, missing)
    if rehearsal:
        used["rehearsal"] = _artifact(rehearsal.manifest)
    mix = rehearsal.mix(len(data.examples)) if rehearsal else None
    steps = plan_steps(data.mixture, *batch, train.num_train_epochs, train.max_steps, flat, mix)
    settings = _settings(config, steps)
    lengths = _lengths(data, rehearsal)
    prefix = _prefix(config, model_config, anatomy, region, lengths, settings.dtype) if steps.num_epochs > 1 else None
    return TrainPlan(
        anatomy, region, masked, factors, held, settings, used, data, steps, prefix, base_fingerprint, tuple(missing),
        adapter, rehearsal=rehearsal,
    )  # fmt: skip


def footprint(plan: TrainPlan, config: Config, world_size: int) -> Footprint:
    """What the run's memory hangs on."""
    checkpointing = config.train.gradient_checkpointing
    return Footprint(
        plan.anatomy, plan.region, plan.settings, world_size, config.data.max_length, checkpointing,
        plan.adapter.num_parameters if plan.adapter else None, config.train.l2_to_base > 0,
    )  # fmt: skip


def _lengths(data: TrainData, rehearsal: Rehearsed | None) -> list[int]:
    own: list[int] = data.lengths.tolist()
    return [*own, *rehearsal.lengths.tolist()] if rehearsal else own


def _check_weights(config: Config, anatomy: Anatomy, dry_run: bool, missing: list[str]) -> str | None:
    """Compare the weight files' headers with the config, and name the base by its fingerprint."""
    name, revision = config.model.name, config.model.revision
    try:
        check_files(weight_files(name, revision, download=not dry_run), anatomy)
        return fingerprint(name, revision, download=not dry_run)
    except UserError as error:
        if not dry_run:
            raise
        missing.append(str(error))
        return None


def _region(config: Config, anatomy: Anatomy, base_fingerprint: str | None, used: dict[str, dict[str, str]]) -> Region:
    if config.adapter is not None:
        return resolve_region("all", config.adapter.modules, anatomy.num_layers, anatomy.modules)
    if config.region is None:
        raise RuntimeError("the schema lets no config without a region or an adapter through")
    if config.region != "search":
        if config.region.match is not None:
            return match_region(config.region.match, anatomy)
        layers, modules = config.region.layers or "", config.region.modules or ()  # the schema fills them in
        return resolve_region(layers, modules, anatomy.num_layers, anatomy.modules)
    folder = config.run / "search"
    layers, modules = read_winner(folder, base_fingerprint)
    used["region"] = _artifact(folder / FILE_NAME)
    return resolve_region(layers, modules, anatomy.num_layers, anatomy.modules)


def _adapter(config: Config, region: Region, anatomy: Anatomy) -> AdapterPlan | None:
    given = config.adapter
    if given is None:
        return None
    return plan_adapter(
        given.kind, region.modules, anatomy, r=given.r, alpha=given.alpha, dropout=given.dropout, kept=given.kept
    )


def _factors(
    config: Config, importance: dict[str, Tensor], region: Region, masked: tuple[str, ...], anatomy: Anatomy
) -> dict[str, Factor]:
    """The soft mask, or the control that stands in for it."""
    softmask = config.softmask
    if softmask.control == "shuffled":
        importance = shuffle_units(importance, anatomy, config.train.seed)
    return build_factors(importance, region, masked, anatomy, softmask.strength, uniform=softmask.control == "uniform")


def _masked_modules(config: Config, region: Region, anatomy: Anatomy) -> tuple[str, ...]:
    if config.softmask.apply_to == "none":
        return ()
    if not region.modules:
        raise UserError(
            "softmask.apply_to: region.match trains no tensor with units (heads, neurons, outputs) that a mask could "
            "lie on; set it to none"
        )
    if config.softmask.modules is None:
        return region.modules
    modules = expand_modules(config.softmask.modules, anatomy.modules)
    check_masked(modules, region)
    return modules


def _check_sharding(config: Config, holds: bool) -> None:
    deepspeed = config.deepspeed
    in_bf16 = choose_dtype(config.model.dtype) == torch.bfloat16
    hooks = {
        "softmask.apply_to: update": config.softmask.apply_to == "update",
        "train.l2_to_base": config.train.l2_to_base > 0,
        "a part of a fused tensor as region": holds,
    }
    what = next((name for name, requested in hooks.items() if requested), None)
    if in_bf16 and deepspeed.zero_stage == 1 and what:
        raise UserError(
            f"deepspeed.zero_stage: 1 with bfloat16 runs DeepSpeed's BF16_Optimizer, under which {what} is not "
            "supported; use zero_stage: 2 or 3"
        )


def _importance(
    config: Config,
    anatomy: Anatomy,
    base_fingerprint: str | None,
    dry_run: bool,
    missing: list[str],
    used: dict[str, dict[str, str]],
) -> dict[str, Tensor]:
    folders = [Path(f) for f in config.softmask.importance or (config.run / "importance",)]
    sets = []
    for number, folder in enumerate(folders, start=1):
        if not (folder / "manifest.json").is_file():
            message = (
                f"softmask: no importance in {folder}; run `cofitune importance` with this config first, name its "
                "folder in softmask.importance, or set softmask.apply_to: none"
            )
            if not dry_run:
                raise ArtifactError(message)
            missing.append(message)
        elif base_fingerprint is not None:  # a dry run without weights has nothing to compare the importance with
            sets.append(read_importance(folder, anatomy, base_fingerprint).vectors)
            name = "importance" if len(folders) == 1 else f"importance {number}"
            used[name] = _artifact(folder / "importance.safetensors")
    return merge_importance(sets) if len(sets) == len(folders) else {}


def _prefix(
    config: Config,
    model_config: PretrainedConfig,
    anatomy: Anatomy,
    region: Region,
    lengths: list[int],
    dtype: torch.dtype,
) -> PrefixPlan | None:
    kind = config.train.prefix_cache
    if kind == "none" or region.first == 0:
        return None
    reason = changing_prefix(model_config.to_dict())
    if reason:
        raise UserError(f"train.prefix_cache: {kind} would not give the same loss: {reason}; set it to none")
    folder = SHARED_MEMORY if kind == "memory" else config.run / "train"
    if kind == "memory" and not folder.is_dir():
        raise UserError(f"train.prefix_cache: memory needs {folder}, which this machine does not have; use disk")
    return PrefixPlan(anatomy.layout.layers, region.first, lengths, anatomy.hidden_size, dtype, folder)


def _settings(config: Config, steps: Plan) -> EngineSettings:
    train, deepspeed = config.train, config.deepspeed
    return EngineSettings(
        zero_stage=deepspeed.zero_stage,
        offload_optimizer=deepspeed.offload_optimizer,
        offload_param=deepspeed.offload_param,
        raw=deepspeed.raw,
        dtype=choose_dtype(config.model.dtype),
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
    )


def _artifact(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256_file(path)}
