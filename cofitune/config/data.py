"""The section `data` of the config: what is trained on, and the template in which it is said."""

from __future__ import annotations

import datetime
import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from cofitune.config.section import PathText, Section
from cofitune.config.source import Source, Sources
from cofitune.errors import did_you_mean

TEMPLATES = ("auto", "chat", "plain")
TEMPLATE_FILES = (".jinja", ".jinja2", ".j2")
# names that transformers gives a template itself
TAKEN = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "strftime_now", "raise_exception", "namespace",
)  # fmt: skip


def _as_day(value: object) -> object:
    """YAML reads 2026-11-28 as a date."""
    return value.isoformat() if isinstance(value, datetime.date) else value


class Replay(Section):
    data: Sources = Field((), description="general data to go over again; default: importance.data")
    share: float = Field(0.1, gt=0, lt=1, description="share of an epoch's items that are general data")

    @field_validator("data")
    @classmethod
    def _the_share_says_how_often(cls, data: tuple[Source, ...]) -> tuple[Source, ...]:
        if any(source.weight != 1 for source in data):
            raise ValueError("weight is for data.train; how often an item of replay counts follows from its share")
        return data


class Data(Section):
    train: Sources = Field((), description="training items, one or more sources")
    validation: Sources = Field((), description="items whose loss is watched and that are not trained on")
    replay: Replay | None = Field(None, description="general data mixed into the training items; null: none")
    max_length: int = Field(512, gt=1, description="tokens an item may have; a longer response is cut, and counted")
    template: PathText = Field(
        "auto",
        description="chat: the tokenizer's chat template; plain: our own; auto: chat where there is one; or a file "
        "with a Jinja template (.jinja)",
    )
    chat_template_kwargs: dict[str, object] = Field(
        default_factory=dict,
        description="values that the chat template reads by name, in training, evaluation and rehearsal alike, such as "
        "enable_thinking: false",
    )
    system: Literal["keep", "merge"] = Field(
        "keep",
        description="system turns; keep: as the template writes them; merge: in front of the user's turn "
        "behind them, for templates without a system role",
    )
    date: Annotated[str | None, BeforeValidator(_as_day)] = Field(
        None, description="day (year-month-day) that a template with a date writes; null: the day the run began"
    )
    train_on: Literal["response", "all"] = Field("response", description="tokens that carry the loss")
    on_bad_item: Literal["error", "drop"] = Field("error", description="stop at an unusable item, or drop and count it")
    packing: bool = Field(
        False, description="several items in a row of up to max_length tokens, each attending to itself alone"
    )

    @field_validator("validation")
    @classmethod
    def _every_item_counts_once(cls, data: tuple[Source, ...]) -> tuple[Source, ...]:
        if any(source.weight != 1 for source in data):
            raise ValueError("weight is for data.train; validation counts every item once")
        return data

    @field_validator("template")
    @classmethod
    def _a_name_or_a_file(cls, template: str) -> str:
        if template not in TEMPLATES and PurePath(template).suffix not in TEMPLATE_FILES:
            near = did_you_mean(template, TEMPLATES)
            raise ValueError(
                f"'{template}' is no template{near} (accepted: {', '.join(TEMPLATES)}, or a file with a Jinja "
                f"template: {', '.join(TEMPLATE_FILES)})"
            )
        return template

    @field_validator("chat_template_kwargs")
    @classmethod
    def _names_that_a_template_can_read(cls, given: dict[str, object]) -> dict[str, object]:
        for name, value in given.items():
            if not re.fullmatch(r"[A-Za-z]\w*", name):
                raise ValueError(f"'{name}' cannot be a name in a template (letters, digits and _)")
            if name in TAKEN:
                raise ValueError(f"'{name}' is given to every template already; leave it out")
            _check_plain(name, value)
        return given

    @field_validator("date")
    @classmethod
    def _a_day(cls, day: str | None) -> str | None:
        if day is not None:
            try:
                datetime.date.fromisoformat(day)
            except ValueError:
                raise ValueError(f"'{day}' is no day; write year-month-day, such as 2026-11-28") from None
        return day


def _check_plain(name: str, value: object) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _check_plain(f"{name}.{key}", part)
    elif isinstance(value, list):
        for part in value:
            _check_plain(name, part)
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{name}: {value!r} is no text, number, true, false or null; put it in quotes")
