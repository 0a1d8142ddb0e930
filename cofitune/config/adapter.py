"""The section `adapter`: PEFT's adapters, in all layers as rivals of the region or in some, as a region says them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cofitune.config.region import MODULE_NAMES, Layers
from cofitune.config.section import Names, Section
from cofitune.errors import did_you_mean

GROUPS = ("mha", "ffn", "all")
TARGETS = ("all-linear", "mha", "ffn")
OF_LORA = ("r", "alpha", "dropout", "rslora")


class Adapter(Section):
    kind: Literal["lora", "dora", "osf"] = Field(
        "lora",
        description="lora: a low-rank product beside each weight (arXiv 2106.09685); dora: and each output's norm "
        "trains apart (arXiv 2402.09353); osf: orthogonal subspace fine-tuning, which trains a weight's lesser "
        "singular directions and keeps its leading ones (arXiv 2504.07097)",
    )
    r: int = Field(16, gt=0, description="lora, dora: rank of the product")
    alpha: float = Field(32.0, gt=0, description="lora, dora: the product is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="lora, dora: probability, on what enters the product")
    rslora: bool = Field(False, description="lora, dora: scale by alpha / √r (arXiv 2312.03732)")
    effective_rank: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="osf: share of each weight's singular directions, the leading ones, that stays as it is",
    )
    layers: Layers = Field(None, description="which layers carry the adapter, as in region.layers; null: all")
    modules: Names | None = Field(
        None, min_length=1, description="which of their modules carry it, as in region.modules; null: target_modules"
    )
    target_modules: Names | None = Field(
        ("all-linear",),
        min_length=1,
        description="the same in PEFT's words: all-linear, mha, ffn, any of q_proj … down_proj",
    )

    @model_validator(mode="before")
    @classmethod
    def _modules_take_the_place_of_targets(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("modules") is not None and "target_modules" not in value:
            return {**value, "target_modules": None}
        return value

    @field_validator("target_modules")
    @classmethod
    def _are_modules(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known(names, (*TARGETS, *MODULE_NAMES))

    @field_validator("modules")
    @classmethod
    def _are_linear(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names and "experts" in names:
            raise ValueError(
                "'experts' are tensors of three dimensions, and an adapter sits beside linear modules; a region trains "
                "them"
            )
        return _known(names, (*MODULE_NAMES, *GROUPS))

    @model_validator(mode="after")
    def _settings_are_the_kinds(self) -> Adapter:
        strange = OF_LORA if self.kind == "osf" else ("effective_rank",)
        if given := self.changed(strange):
            raise ValueError(f"{', '.join(given)}: not read by kind: {self.kind}")
        return self

    @model_validator(mode="after")
    def _one_says_the_modules(self) -> Adapter:
        if self.modules and self.target_modules:
            raise ValueError("modules and target_modules say the same in two ways: give one of them")
        if not self.modules and not self.target_modules:
            raise ValueError("modules and target_modules are both null: say what carries the adapter (all-linear)")
        return self

    @property
    def carriers(self) -> tuple[str, ...]:
        """Modules and groups by the words of a region."""
        return tuple("all" if name == "all-linear" else name for name in self.modules or self.target_modules or ())


def _known(names: tuple[str, ...] | None, known: tuple[str, ...]) -> tuple[str, ...] | None:
    for name in names or ():
        if name not in known:
            raise ValueError(f"'{name}' is no module{did_you_mean(name, known)} (accepted: {', '.join(known)})")
    return names
