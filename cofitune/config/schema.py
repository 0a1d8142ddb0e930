"""What a config may say. One frozen model a section; every field has a sentence, a unit and a sane default.

The four commands share this schema; `SECTIONS_READ` says which parts each one reads, and so which changes make an
output folder "made by another config".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cofitune.config.adapter import Adapter
from cofitune.config.compare import Compare
from cofitune.config.data import Data, Replay
from cofitune.config.eval import Eval, EvalModel, Task, Versatility, as_model
from cofitune.config.hints import DTYPES, HALF
from cofitune.config.region import Anatomy, Region
from cofitune.config.rehearsal import Rehearsal
from cofitune.config.search import Search
from cofitune.config.section import Names, Paths, PathText, Section
from cofitune.config.source import Source, Sources
from cofitune.config.train import DeepSpeed, Train
from cofitune.errors import ConfigError

__all__ = [
    "SECTIONS_READ", "Adapter", "Compare", "Config", "Data", "DeepSpeed", "Eval", "EvalModel", "Region", "Rehearsal",
    "Replay", "Search", "Source", "Task", "Train", "Versatility",
]  # fmt: skip

TEMPLATE = ("data.template", "data.chat_template_kwargs", "data.system")
SECTIONS_READ: dict[str, tuple[str, ...]] = {
    "train": ("model", "data", "region", "adapter", "softmask", "train", "deepspeed"),
    "importance": ("model", "data.max_length", *TEMPLATE, "data.on_bad_item", "importance"),
    "rehearsal": ("model", *TEMPLATE, "data.on_bad_item", "rehearsal"),
    "eval": ("model", *TEMPLATE),  # answers are kept by what they depend on: tasks and models may come and go
    "compare": ("model", *TEMPLATE),  # every run's folder knows by itself what it was made by
    "search": ("model", "deepspeed"),  # the rest is compared, by contents, in the identity of the store of trials
}

# settings of those sections that change nothing in what is trained: they may differ from one call to the next
FREE_SETTINGS: dict[str, frozenset[str]] = {
    "data": frozenset({"validation", "date"}),  # a date that the template writes is compared with the template
    "importance": frozenset({"save_steps", "sharding"}),
    "train": frozenset(
        {
            "save_steps",
            "save_total_limit",
            "keep_checkpoints",
            "ddp_timeout",
            "stop_grace_seconds",
            "validation_steps",
            "drift_data",
            "report_to",
            "gradient_checkpointing",  # computes the same again
        }
    ),
    "deepspeed": frozenset({"zero_stage"}),  # shares the same over the ranks
}


def _by_short_name(value: object) -> object:
    """`bf16` and `fp32` stand for torch's names; half precision is refused with its reason."""
    if isinstance(value, str) and value in HALF:
        raise ValueError(
            f"{value} is not supported: its range needs loss scaling; use bfloat16, or float32 on a device without it"
        )
    return DTYPES.get(value, value) if isinstance(value, str) else value


class Model(Section):
    name: PathText = Field(min_length=1, description="folder or hub name of the aligned model to start from")
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        BeforeValidator(_by_short_name, json_schema_input_type=Literal["auto", "float32", "bfloat16", "bf16", "fp32"]),
    ] = Field(
        "auto",
        description="the one place for precision; auto: bfloat16 on a GPU, float32 on a CPU; bf16 and fp32 for short",
    )
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
    ] = Field(
        "auto",
        description="attention kernel, by transformers' names; auto: sdpa, or eager for a model without it; of packs "
        "each conversation by itself where the family can",
    )
    kernels: Literal["auto"] | bool = Field(
        "auto",
        description="fused kernels (Liger) of norm, gated FFN and rotary embedding, in training and evaluation; auto: "
        "on a GPU, where liger-kernel is installed and knows the family",
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="run code that the model's folder brings along")
    anatomy: Anatomy | None = Field(
        None, description="what a decoder layer is made of; null: as one of the layouts that are known"
    )

    @model_validator(mode="after")
    def _flash_is_half_precision(self) -> Model:
        if self.has_flash_attention and self.dtype == "float32":
            raise ValueError(
                f"model.attn_implementation: {self.attn_implementation} computes in bfloat16 alone, and model.dtype is "
                "float32; set one of the two to auto"
            )
        return self

    @property
    def has_flash_attention(self) -> bool:
        """Whether attention takes conversations that lie behind one another in one row."""
        return self.attn_implementation.startswith("flash_attention")


class Importance(Section):
    data: Sources = Field((), description="general data: what the model should keep being able to do")
    estimator: Literal["kl_dropout", "fisher", "wanda"] = Field(
        "fisher",
        description="fisher: squared gradients of the responses' log-likelihood; kl_dropout: the paper's, KL between "
        "two dropout passes, which takes several times the items to be as reliable; wanda: of input columns, for "
        "softmask.axis: columns: a column's weights times the norm of its input, without gradients",
    )
    passes: int = Field(
        2,
        ge=2,
        multiple_of=2,
        description="kl_dropout: dropout passes over each micro-batch; the KL of each pair is taken, and the gradients "
        "of several pairs are averaged",
    )
    dropout: float = Field(
        0.003, gt=0, lt=1, description="kl_dropout: probability, on attention weights and FFN outputs"
    )
    reduce: Literal["signed", "absolute", "squared"] | None = Field(
        None,
        description="how gate gradients add up over items: signed (the published code), absolute (DAS), squared "
        "(fisher), and inputs (wanda); null: signed for kl_dropout, else squared",
    )
    normalize: Literal["zscore_tanh", "rank"] | None = Field(
        None,
        description="per layer: |tanh(z-score)| of signed scores, or the share of units that score less; null: "
        "zscore_tanh for signed, else rank",
    )
    per_device_batch_size: int = Field(4, gt=0, description="items a micro-batch on one device")
    max_items: int | None = Field(
        None, gt=0, description="items to use, from the top of each source in proportion to its size; null: all"
    )
    seed: int = Field(1234, ge=0, description="seed of the dropout masks")
    save_steps: int = Field(
        25, gt=0, description="micro-batches on a rank between saves, from which an interrupted run goes on"
    )
    sharding: Literal["auto", "none", "zero3"] = Field(
        "auto",
        description="zero3: the ranks share the weights; none: each holds them all, which is faster; auto: zero3 where "
        "there are several ranks and the model does not fit each one's device",
    )

    @field_validator("data")
    @classmethod
    def _every_item_counts_once(cls, data: tuple[Source, ...]) -> tuple[Source, ...]:
        if any(source.weight != 1 for source in data):
            raise ValueError("weight is for data.train; importance counts every item once")
        return data

    @property
    def reduced_by(self) -> Literal["signed", "absolute", "squared"]:
        """The reduction, the estimator's default filled in."""
        return self.reduce or ("signed" if self.estimator == "kl_dropout" else "squared")

    @property
    def normalized_by(self) -> Literal["zscore_tanh", "rank"]:
        """The normalisation, the reduction's default filled in."""
        return self.normalize or ("zscore_tanh" if self.reduced_by == "signed" else "rank")

    @model_validator(mode="after")
    def _parts_fit(self) -> Importance:
        if (self.estimator == "kl_dropout") == (self.reduced_by == "squared"):
            raise ValueError(
                f"reduce: {self.reduced_by} does not fit estimator: {self.estimator} (kl_dropout: signed or absolute; "
                "fisher and wanda: squared)"
            )
        if self.estimator != "kl_dropout":
            default = ", the default," if self.estimator == "fisher" else ""
            for name in self.changed(("passes", "dropout")):
                raise ValueError(
                    f"{name}: {getattr(self, name)} is for estimator: kl_dropout; {self.estimator}{default} drops "
                    "nothing and takes one pass. Say estimator: kl_dropout, or leave it out"
                )
        if self.normalized_by == "zscore_tanh" and self.reduced_by != "signed":
            raise ValueError(
                f"normalize: zscore_tanh does not fit reduce: {self.reduced_by}, whose scores are never negative: the "
                "least important units would be masked almost as hard as the most; use rank"
            )
        return self


class SoftMask(Section):
    apply_to: Literal["update", "gradient", "none"] = Field(
        "update", description="update: scales the step itself; gradient: the paper's equation; none: no mask"
    )
    axis: Literal["rows", "columns"] = Field(
        "rows",
        description="what a factor lies on; rows: a head's, neuron's or output's weights; columns: the input columns "
        "of each weight, for an importance of estimator: wanda",
    )
    strength: float = Field(
        1.0, gt=0, le=1, description="s in the factor 1 − s·I: 1 stops the most important units, less lets them move"
    )
    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="a hard mask: units of at least this importance have the factor 1 − s, all others 1; null: soft",
    )
    importance: Paths | None = Field(
        None,
        min_length=1,
        description="folders with importance.safetensors, merged by the larger importance of each unit; null: the one "
        "in this config's output_dir",
    )
    modules: Names | None = Field(None, min_length=1, description="modules to mask; null: all that are trained")
    control: Literal["none", "uniform", "shuffled"] = Field(
        "none",
        description="what the mask is held against; uniform: each module's mean factor on all its units; shuffled: the "
        "factors permuted over each layer's units, drawn from train.seed",
    )

    @model_validator(mode="after")
    def _a_control_stands_for_a_mask(self) -> SoftMask:
        if self.control != "none" and self.apply_to == "none":
            raise ValueError(
                f"control: {self.control} stands in for a mask; say with apply_to on what, or control: none"
            )
        if self.threshold is not None and self.apply_to == "none":
            raise ValueError("threshold: makes the mask a hard one, and apply_to: none asks for no mask; leave it out")
        return self


class Config(Section):
    """The whole file. `output_dir` is the run: every artifact of the four commands lives below it."""

    model: Model
    output_dir: PathText = Field(min_length=1, description="the run's folder")
    data: Data = Field(default_factory=Data)
    region: Region | Literal["search"] | None = Field(
        default_factory=Region, description="what to train, or: search; null, and by default, with an adapter"
    )
    adapter: Adapter | None = Field(None, description="an adapter instead of a region: lora, dora or osf; null: none")
    importance: Importance = Field(default_factory=Importance)
    rehearsal: Rehearsal = Field(default_factory=Rehearsal)
    softmask: SoftMask = Field(default_factory=lambda: SoftMask(apply_to="none"))
    train: Train = Field(default_factory=Train)
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    eval: Eval = Field(default_factory=Eval)
    search: Search = Field(default_factory=Search)
    compare: Compare = Field(default_factory=Compare)

    @model_validator(mode="before")
    @classmethod
    def _an_adapter_has_no_region(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("adapter") is not None and "region" not in value:
            return {**value, "region": None}
        return value

    @field_validator("output_dir")
    @classmethod
    def _a_run_has_a_folder_of_its_own(cls, path: str) -> str:
        if Path(path).resolve() == Path("/"):
            raise ValueError("is the root of the file system: name a folder of the run's own, such as runs/law")
        return path

    @model_validator(mode="after")
    def _adapter_or_region(self) -> Config:
        if self.adapter is None:
            if self.region is None:
                raise ValueError("region: null goes with an adapter; without one, name layers and modules, or search")
            return self
        if self.region is not None:
            raise ValueError(
                "adapter and region exclude each other: set region: null, and name layers and modules in the section "
                "adapter"
            )
        if self.softmask.apply_to != "none":
            raise ValueError(
                f"softmask.apply_to: {self.softmask.apply_to} masks units of trained weights, and an adapter trains "
                "none of the model's own; set it to none"
            )
        if self.train.l2_to_base:
            raise ValueError(
                "train.l2_to_base pulls trained weights towards the base, and an adapter's have none there; set it to 0"
            )
        if self.train.prefix_cache != "none" and self.adapter.layers is None:
            raise ValueError(
                f"train.prefix_cache: {self.train.prefix_cache} keeps what frozen layers give, and this adapter sits "
                "in all of them; set it to none, or name the adapter's layers in adapter.layers"
            )
        return self

    @model_validator(mode="after")
    def _8_bit_moments_stay_on_the_device(self) -> Config:
        if self.train.optimizer == "adamw_8bit" and self.deepspeed.offload_optimizer == "cpu":
            raise ValueError(
                "train.optimizer: adamw_8bit keeps its moments on the device, and deepspeed.offload_optimizer: cpu "
                "would take them off; choose one of the two"
            )
        return self

    @model_validator(mode="after")
    def _replay_has_data(self) -> Config:
        if self.data.replay and not (self.data.replay.data or self.importance.data):
            raise ValueError("data.replay: name general data in data.replay.data or in importance.data")
        return self

    @model_validator(mode="after")
    def _flat_packs_have_no_prefix(self) -> Config:
        flat = self.data.packing and self.model.has_flash_attention
        for section, kind in (("train", self.train.prefix_cache), ("search", self.search.prefix_cache)):
            if kind != "none" and flat:
                raise ValueError(
                    f"data.packing with model.attn_implementation: {self.model.attn_implementation} lays a "
                    f"micro-batch's packs in one row, which {section}.prefix_cache cannot tell apart; set one of the "
                    "three otherwise"
                )
        return self

    @model_validator(mode="after")
    def _own_code_has_no_prefix(self) -> Config:
        for section, kind in (("train", self.train.prefix_cache), ("search", self.search.prefix_cache)):
            if kind != "none" and self.model.trust_remote_code:
                raise ValueError(
                    f"{section}.prefix_cache: {kind} stands in for the frozen layers of transformers' own models; with "
                    "model.trust_remote_code: true it must be none"
                )
        return self

    @property
    def run(self) -> Path:
        """The run's folder as a path."""
        return Path(self.output_dir)

    def with_models(self, models: Sequence[str], full_sft: str | None) -> Config:
        """The same config with further models in `eval.models`, each `PATH` or `NAME=PATH`.

        Raises:
            ConfigError: full fine-tuning's model is named in the config already.
        """
        further = [EvalModel.model_validate(as_model(m)) for m in models]
        if full_sft:
            further.append(EvalModel.model_validate(as_model(full_sft)).model_copy(update={"role": "full_sft"}))
        if full_sft and any(m.role == "full_sft" for m in self.eval.models):
            raise ConfigError([f"--full-sft {full_sft}: eval.models names a model with the role full_sft already"])
        return self.model_copy(update={"eval": self.eval.model_copy(update={"models": (*self.eval.models, *further)})})
