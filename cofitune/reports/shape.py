"""JSON files of ours as dataclasses: what a report reads of them is checked; the rest is left aside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cofitune.errors import ArtifactError
from cofitune.files import read_json

T = TypeVar("T")


def shaped(kind: type[T], content: Mapping[str, object]) -> T:
    """Make a dataclass of JSON's values; keys that it does not have are left aside.

    Raises:
        ValueError: a value lacks or is of another type; the message names its place.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        lacks = first["type"] in ("missing", "missing_argument")
        raise ValueError(f"{place} is missing" if lacks else f"{place}: {first['msg']}") from None


def read_shaped(path: Path, what: str, form: int, shape: Callable[[dict[str, object]], T]) -> T:
    """Read a file that says its format, and give what `shape` makes of its content.

    Raises:
        ArtifactError: it is missing, damaged (`shape` raised a ValueError), or of another format than `form`.
    """
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: this {what} is damaged: it is no JSON object")
    if content.get("format") != form:
        raise ArtifactError(
            f"{path}: its format is {content.get('format')}, and {form} is what we read; make it again with the "
            f"command that made it (`cofitune {path.parent.name}`), which asks no model anew"
        )
    try:
        return shape(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: this {what} is damaged: {error}") from None
