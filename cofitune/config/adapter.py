"""The section `adapter`: PEFT's adapters, rivals of the region."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cofitune.config.region import MODULE_NAMES
from cofitune.config.section import Names, Section
from cofitune.errors import did_you_mean

GROUPS = ("all-linear", "mha", "ffn")


class Adapter(Section):
    kind: Literal["lora", "osf"] = Field(
        "lora",
        description="lora: a low-rank product beside each weight (arXiv 2106.09685); osf: orthogonal subspace "
        "fine-tuning, which trains a weight's lesser singular directions and keeps its leading ones (arXiv 2504.07097)",
    )
    r: int = Field(16, gt=0, description="lora: rank of the product")
    alpha: float = Field(32.0, gt=0, description="lora: the product is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="lora: probability, on what enters the product")
    effective_rank: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="osf: share of each weight's singular directions, the leading ones, that stays as it is",
    )
    target_modules: Names = Field(
        ("all-linear",),
        min_length=1,
        description="modules, of all layers, that carry the adapter: all-linear, mha, ffn, any of q_proj … down_proj",
    )

    @field_validator("target_modules")
    @classmethod
    def _are_modules(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = (*GROUPS, *MODULE_NAMES)
        for name in names:
            if name not in known:
                raise ValueError(f"'{name}' is no module{did_you_mean(name, known)} (accepted: {', '.join(known)})")
        return names

    @model_validator(mode="after")
    def _settings_are_the_kinds(self) -> Adapter:
        strange = ("effective_rank",) if self.kind == "lora" else ("r", "alpha", "dropout")
        given = [name for name in strange if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: not read by kind: {self.kind}")
        return self

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules and groups by the words of a region."""
        return tuple("all" if name == "all-linear" else name for name in self.target_modules)
