"""What all sections of the config are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def as_list(value: Any) -> Any:
    """`x` stands for `[x]`, so that one file needs no list."""
    return value if value is None or isinstance(value, list | tuple) else [value]


def as_source(value: Any) -> Any:
    """A path alone stands for `{path: …}`."""
    return {"path": value} if isinstance(value, str) else value


def as_text(value: Any) -> Any:
    """`layers: 3` is read by YAML as a number and means the text `3`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Names = Annotated[tuple[str, ...], BeforeValidator(as_list)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())
