"""The sections `region`, what trains, and `model.anatomy`, what a model is made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cofitune.config.section import Names, Section, as_text
from cofitune.errors import did_you_mean

MODULE_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _joined(value: object) -> object:
    """`[0-3, 8]` stands for `0-3,8`."""
    return ",".join(str(as_text(part)) for part in value) if isinstance(value, list | tuple) else as_text(value)


Layers = Annotated[
    str | None, BeforeValidator(_joined, json_schema_input_type=str | int | tuple[str | int, ...] | None)
]


class Region(Section):
    layers: Layers = Field(
        None,
        description="25%-50% (the default), 8-15 (0-based, inclusive), 3, bottom2 or another name, or a list of them",
    )
    modules: Names | None = Field(
        None,
        min_length=1,
        description="q_proj … down_proj, the groups mha, ffn, all, or experts; default: up_proj and down_proj",
    )
    match: str | None = Field(
        None,
        description="instead of layers and modules: a regular expression; exactly the parameters train whose whole "
        "name it matches",
    )

    @model_validator(mode="before")
    @classmethod
    def _the_papers_by_default(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("match") is not None:
            return value
        given = {k: part for k, part in value.items() if part is not None or k not in cls.model_fields}
        return {"layers": "25%-50%", "modules": ("up_proj", "down_proj"), **given}

    @model_validator(mode="after")
    def _a_regex_says_all(self) -> Region:
        if self.match is None:
            return self
        if self.layers is not None or self.modules is not None:
            raise ValueError(
                "match takes the place of layers and modules; give either (on the command line: "
                "\"region={match: '…'}\")"
            )
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: '{self.match}' is no regular expression: {error}") from None
        return self


class Anatomy(Section):
    """A layout that is not in cofitune's own table (`cofitune/model/layouts.py`), by the same fields."""

    layers: str = Field(description="path of the list of decoder layers, such as transformer.h")
    modules: dict[str, str] = Field(
        description="q_proj … down_proj → path of the linear module below a layer; modules with the same path are "
        "fused, in the order written; leave gate_proj out where the FFN has no gate"
    )
    attention: str = Field(description="path, below a layer, of the module that drops attention probabilities")
    attention_dropout: str = Field(
        "attention_dropout",
        description="its attribute with their probability, a number or an nn.Dropout; config.NAME: its config's",
    )
    interleaved: bool = Field(
        False,
        description="how fused q, k, v lie; false: one after the other; true: a key/value head at a time, each with "
        "the query heads that it serves, its key and its value",
    )
    transposed: bool = Field(False, description="weights are [in, out], as those of transformers' Conv1D")
    num_heads: int | None = Field(None, gt=0, description="attention heads; null: as config.json says")
    num_key_value_heads: int | None = Field(None, gt=0, description="key/value heads; null: as config.json says")
    head_dim: int | None = Field(None, gt=0, description="width of a head; null: as config.json says")

    @field_validator("modules")
    @classmethod
    def _modules_are_a_layers(cls, modules: dict[str, str]) -> dict[str, str]:
        for name in modules:
            if name not in MODULE_NAMES:
                raise ValueError(f"'{name}' is no module{did_you_mean(name, MODULE_NAMES)} ({', '.join(MODULE_NAMES)})")
        missing = [name for name in MODULE_NAMES if name not in modules and name != "gate_proj"]
        if missing:
            raise ValueError(f"{', '.join(missing)}: say where it lies (only gate_proj may be left out)")
        for path in set(modules.values()):
            fused = [name for name, other in modules.items() if other == path]
            if len(fused) > 1 and set(fused) not in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
                raise ValueError(
                    f"{', '.join(fused)} cannot all lie in '{path}': q, k, v are fused, or gate and up, or none"
                )
        return modules
