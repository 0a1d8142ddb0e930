"""Sources of items, as several sections of the config name them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from cofitune.config.section import PathText, Section, as_list, as_source


class Source(Section):
    path: PathText = Field(
        description="a file (JSONL, JSON, parquet, CSV), a folder of such files, or org/name on the hub; paths are "
        "relative to the folder the command is typed in"
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion"] = Field(
        "auto",
        description="alpaca: instruction, input, output; messages: turns of role, content; sharegpt: conversations of "
        "from, value; prompt_completion: strings or lists of messages; auto: by the item's keys",
    )
    split: str = Field("train", description="of a folder: the files with this split in their names; on the hub: split")
    subset: str | None = Field(None, description="configuration of a data set on the hub")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    weight: float = Field(
        1.0, gt=0, description="how often each item counts in an epoch: 0.5 is a fresh random half, 2 is twice"
    )


Sources = Annotated[
    tuple[Annotated[Source, BeforeValidator(as_source)], ...],
    BeforeValidator(as_list, json_schema_input_type=str | Source | tuple[str | Source, ...]),
]
