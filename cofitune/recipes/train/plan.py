"""Everything about a training run that can be known, and refused, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cofitune.config import schema
from cofitune.config.schema import Config
from cofitune.data.batches import Plan, plan_steps
from cofitune.data.chat import Example
from cofitune.model.anatomy import Anatomy
from cofitune.model.load import choose_dtype
from cofitune.model.region import Region
from cofitune.model.varlen import knows_varlen
from cofitune.model.weight_files import stored_dtype, weight_files
from cofitune.recipes.from_config import base_anatomy, base_config, kernels_recorded
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.recipes.train import resolve
from cofitune.recipes.train.data import TrainData, read_train_data
from cofitune.recipes.train.rehearsal import BaseIdentity, Joined, Rehearsed, read_rehearsed
from cofitune.recipes.train.softmask import plan_mask
from cofitune.softmask.factors import Factor, freeze_factors, join
from cofitune.training.engine import EngineSettings, check_config
from cofitune.training.fit_device import choose_checkpointed, choose_hpz_ranks, choose_stage, device_bytes, ranks_here
from cofitune.training.memory import Footprint
from cofitune.training.monitor import check_usable
from cofitune.training.optimizer import check_optimizer
from cofitune.training.peft import AdapterPlan
from cofitune.training.prefix_cache import PrefixPlan
from cofitune.training.state import BYTES_A_WEIGHT

HIGH_RATE = 1e-2  # a peak rate above it is most likely a slip


@dataclass(frozen=True)
class TrainPlan:
    """A run, resolved.

    Attributes:
        config: what it was resolved from.
        folder: `<output_dir>/train`.
        masked: modules under the soft mask, empty without one.
        factors: parameter name → soft-mask factor.
        held: fused tensor's name → factor 0 on its rows that do not train, where it trains in part.
        used: artifacts that the run stands on: what, where, sha256.
        prefix: what the prefix cache will keep; None without one.
        base_fingerprint: None where a dry run has nothing to know it by.
        rehearsal: the base's own answers, to train on beside the items, and to measure drift on; None without any.
        missing: what a dry run could not find but the run will need.
        notes: what is to be said before the run.
        region: what trains; under an adapter what carries it, which merging will change.
        adapter_begins: hash of what an OSF adapter begins with, known once it is in the model.
        kept_stage: the ZeRO stage that a training on its way began under, which `auto` then means; None: it chooses.
        checkpointed: layers, from the lowest trained one up, whose activations are computed again.
        stored: the dtype of most of the weights on disk; None where a dry run has none to look at.
        varlen: whether attention takes each conversation of a pack for itself, without a mask of all pairs of tokens.
    """

    config: Config
    folder: Path
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
    notes: tuple[str, ...] = ()
    adapter: AdapterPlan | None = None
    adapter_begins: str | None = None
    rehearsal: Rehearsed | None = None
    checkpointed: int = 0
    kept_stage: int | None = None
    stored: torch.dtype | None = None
    varlen: bool = False

    @property
    def examples(self) -> Sequence[Example]:
        """All that is trained on: the items (or packs of them), and behind them those of the rehearsal."""
        return Joined(self.data.examples, self.rehearsal.examples) if self.rehearsal else self.data.examples

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        own: list[int] = self.data.lengths.tolist()
        return [*own, *self.rehearsal.lengths.tolist()] if self.rehearsal else own

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
    def footprint(self) -> Footprint:
        """What the run's memory depends on."""
        config, attention = self.config, self.config.model.attn_implementation
        return Footprint(
            anatomy=self.anatomy,
            region=self.region,
            settings=self.settings,
            world_size=self.steps.world_size,
            max_length=max(self.lengths, default=self.config.data.max_length),
            checkpointed=self.checkpointed,
            adapter=self.adapter,
            base_kept=self.config.train.l2_to_base > 0,
            masked=config.model.trust_remote_code or self.pack_attention == "mask",
            fused=self.anatomy.fuses_attention if attention == "auto" else attention != "eager",
            converting=ranks_here(self.steps.world_size) if self.converts else 1,
        )

    @property
    def pack_attention(self) -> str | None:
        """How attention tells the conversations of a pack apart: varlen | flash | mask; None without packs."""
        if not self.config.data.packing:
            return None
        return "flash" if self.config.model.has_flash_attention else "varlen" if self.varlen else "mask"

    @property
    def converts(self) -> bool:
        """Whether the weights are stored in another dtype than they are trained in."""
        return self.stored not in (None, self.settings.dtype)

    @property
    def resolved(self) -> dict[str, int | str]:
        """What `auto` has come to, as plan and manifest say it."""
        found: dict[str, int | str] = {"zero_stage": self.settings.zero_stage, "checkpointed_layers": self.checkpointed}
        if self.pack_attention:
            found["pack_attention"] = self.pack_attention
        return found | ({"zero_hpz_partition_size": self.settings.hpz_ranks} if self.settings.hpz_ranks > 1 else {})

    def fitted(self, room: int, node: int = 1) -> TrainPlan:
        """The same run with what `auto` leaves open chosen for a device.

        Args:
            room: bytes that the smallest device has.
            node: ranks on each node.
        """
        config, depth = self.config, self.footprint.depth
        requested = config.train.gradient_checkpointing if self.anatomy.can_recompute else False
        plan = replace(self, checkpointed=resolve.checkpointed_layers(requested, depth))
        if config.deepspeed.zero_stage == "auto":
            stage = self.kept_stage or choose_stage(plan.footprint, room)
            plan = replace(plan, settings=replace(plan.settings, zero_stage=stage))
        hpz = choose_hpz_ranks(plan.footprint, room, node)
        plan = replace(plan, settings=replace(plan.settings, hpz_ranks=hpz))
        if requested == "auto":
            plan = replace(plan, checkpointed=choose_checkpointed(plan.footprint, room))
        return plan

    @property
    def num_trained(self) -> int:
        """Weights that may move: the region's, or the adapter's own."""
        return self.adapter.num_parameters if self.adapter else self.region.num_parameters(self.anatomy)

    @property
    def trained(self) -> list[str]:
        """Names of the model's own parameters that train, wholly or in part; under an adapter none does."""
        return [] if self.adapter else self.region.parameter_names(self.anatomy)

    def factors_on(self, what: str) -> dict[str, Factor]:
        """What multiplies the gradient, or the update: held rows have 0 on both, the soft mask lies on one of them."""
        return join(self.held, self.factors if self.config.softmask.apply_to == what else {})


def plan_train(
    config: Config, world_size: int, dry_run: bool = False, known_data: TrainData | None = None
) -> TrainPlan:
    """Resolve a run and find every mistake of the user's in it.

    A dry run also plans a model of which only config.json is at hand: it says what is missing, and leaves unknown what
    depends on it.

    Args:
        world_size: ranks that will train.
        known_data: what was read before by the same sections `model` and `data`; None: it is read now.

    Raises:
        UserError: the first thing that would make the run impossible or not what the config says.
    """
    train, model = config.train, config.model
    check_usable(train.report_to)
    check_optimizer(train.optimizer)
    needs = Prerequisites(dry_run)
    base_model = base_config(model, config.data.max_length)
    anatomy = base_anatomy(model, base_model)
    kernels_recorded(model, anatomy.model_type)  # or a refusal
    resolve.check_recomputation(train.gradient_checkpointing, anatomy)
    base = needs.check_base(model, anatomy)
    region, adapter = resolve.find_trained(config.region, config.adapter, config.run / "search", anatomy, needs, base)
    held = freeze_factors(region, anatomy)
    dtype = choose_dtype(model.dtype)
    resolve.check_zero_stage(config.deepspeed.zero_stage, dtype, config.softmask.apply_to, train.l2_to_base, bool(held))
    masked, factors = plan_mask(config.softmask, config.run, region, anatomy, needs, base, train.seed)
    data = known_data or read_train_data(model, config.data, config.importance.data, needs)
    made_by = BaseIdentity(model.name, base, thinks=config.eval.think_end_token is not None)
    rehearsal = read_rehearsed(train, config.data, data, made_by, config.run, needs)
    flat = config.data.packing and model.has_flash_attention  # packs lie in one row
    steps = _plan_steps(train, flat, data, rehearsal, world_size)
    _warn_of_rate(train.learning_rate, needs)
    settings = resolve.engine_settings(train, config.deepspeed, dtype, steps)
    if config.deepspeed.raw:
        check_config(settings)
    plan = TrainPlan(
        config=config,
        folder=config.run / "train",
        anatomy=anatomy,
        region=region,
        masked=masked,
        factors=factors,
        held=held,
        settings=settings,
        used=needs.used,
        data=data,
        steps=steps,
        prefix=None,
        base_fingerprint=base,
        missing=tuple(needs.missing),
        notes=tuple(needs.notes),
        adapter=adapter,
        rehearsal=rehearsal,
        varlen=config.data.packing and model.attn_implementation == "auto" and knows_varlen(base_model, dtype),
        stored=stored_dtype(weight_files(model.name, model.revision, download=False)) if base else None,
    )
    return _with_prefix(plan.fitted(device_bytes(world_size)))


def _warn_of_rate(rate: float, needs: Prerequisites) -> None:
    if rate > HIGH_RATE:
        needs.notes.append(
            f"warning: train.learning_rate: {rate:g} is far above what AdamW takes (1e-5 to 1e-3): the training is "
            "likely to diverge"
        )


def _with_prefix(plan: TrainPlan) -> TrainPlan:
    if plan.steps.num_epochs == 1:  # one pass over the data would reuse nothing
        return plan
    train, model = plan.config.train, plan.config.model
    prefix = resolve.plan_prefix(train.prefix_cache, model, plan.anatomy, plan.region.first, plan.lengths, plan.folder)
    return replace(plan, prefix=prefix)


def _plan_steps(train: schema.Train, flat: bool, data: TrainData, rehearsal: Rehearsed | None, world_size: int) -> Plan:
    """How the examples are shared out over steps, ranks and micro-batches."""
    return plan_steps(
        data.mixture,
        micro_batch=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        world_size=world_size,
        epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        flat=flat,
        rehearsal=rehearsal.mix(len(data.examples)) if rehearsal else None,
    )
