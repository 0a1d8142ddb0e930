"""JSON files of ours as dataclasses: what a report reads of them is checked; the rest is left aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cofitune.errors import ArtifactError
from cofitune.files import read_json

T = TypeVar("T")
# an object of JSON that is read key by key: a line, a trial, a manifest, of whichever version
Entry = Mapping[str, Any]


def read_shaped(path: Path, what: str, form: int, shape: Callable[[dict[str, object]], T]) -> T:
    """Read a file that says its format, and give what `shape` makes of its content.

    Raises:
        ArtifactError: it is missing, damaged (`shape` raised a ValueError), or of another format than `form`.
    """
    content = read_json(path, what)
    if content.get("format") != form:
        raise ArtifactError(
            f"{path}: its format is {content.get('format')}, and {form} is what we read; make it again with the "
            f"command that made it (`cofitune {path.parent.name}`), which asks no model anew"
        )
    try:
        return shape(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: this {what} is damaged: {error}") from None
