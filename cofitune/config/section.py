"""What all sections of the config are made of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_BARE_VARIABLE = re.compile(r"\$(\w+)")


def expand(path: str) -> str:
    """A path in which `~` and `${VAR}` mean what they mean in a shell.

    Raises:
        ValueError: a variable is not set, is written without braces, or `{{ … }}` was left to be filled in.
    """
    if "{{" in path:
        raise ValueError(f"{path}: {{{{ … }}}} is a placeholder that nothing fills in here; write the value")
    for name in _BARE_VARIABLE.findall(path):
        if name in os.environ:
            raise ValueError(f"{path}: write ${{{name}}} for the variable's value")

    def value_of(found: re.Match[str]) -> str:
        if not found[0].endswith("}") or not found[1].isidentifier():
            raise ValueError(f"{path}: {found[0]} is no variable; write ${{NAME}}")
        if not os.environ.get(found[1]):
            raise ValueError(f"{path}: the variable {found[1]} is not set")
        return os.environ[found[1]]

    # Path.expanduser would drop a leading ./ and stop at a file called ~backup
    return os.path.expanduser(_VARIABLE.sub(value_of, path))  # noqa: PTH111


def as_path(value: object) -> object:
    """A path, expanded; anything else is left to the schema to refuse."""
    return expand(value) if isinstance(value, str) else value


def as_list(value: object) -> object:
    """`x` stands for `[x]`, so that one file needs no list."""
    return value if value is None or isinstance(value, list | tuple) else [value]


def as_source(value: object) -> object:
    """A path alone stands for `{path: …}`."""
    return {"path": value} if isinstance(value, str) else value


def as_text(value: object) -> object:
    """`layers: 3` is read by YAML as a number and means the text `3`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


PathText = Annotated[str, BeforeValidator(as_path)]
# the input types are what editors accept by the JSON Schema: a shorthand is no mistake there
Paths = Annotated[tuple[PathText, ...], BeforeValidator(as_list, json_schema_input_type=str | tuple[str, ...])]
Names = Annotated[tuple[str, ...], BeforeValidator(as_list, json_schema_input_type=str | tuple[str, ...])]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False, protected_namespaces=())

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of these fields that are not at their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
