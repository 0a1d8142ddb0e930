"""Files of one JSON value a line that grow while a command runs, so that a killed one continues where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cofitune.errors import ArtifactError, WriteError

T = TypeVar("T")


def append_line(path: Path, text: str) -> None:
    """Add a line of JSON and wait until it is on the disk; half a line that a killed process left is cut off first.

    Raises:
        WriteError: the disk is full, or the file's folder is gone.
    """
    try:
        _append(path, text)
    except FileNotFoundError as error:
        raise WriteError(path, "its folder is gone; was it deleted while the command ran?") from error
    except OSError as error:
        raise WriteError(path, error.strerror or str(error)) from error


def _append(path: Path, text: str) -> None:
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def json_object(text: str) -> dict[str, Any]:
    """Parse a line that holds a JSON object.

    Raises:
        ValueError: it does not.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def read_lines(
    path: Path,
    parse: Callable[[str], T],
    *,
    may_be_torn: bool,
    what: str = "line",
    on_damaged: Callable[[str], None] | None = None,
) -> list[T]:
    """Read a file line by line; nothing where there is no file.

    Args:
        parse: makes a value of a line's text; it raises ValueError, KeyError or TypeError for a damaged one.
        may_be_torn: a last line without its line break was cut off by a kill, and is left out.
        what: names a line in the message.
        on_damaged: gets the message of a damaged line, which is left out; None: it is raised.

    Raises:
        ArtifactError: a line is damaged (file:line).
    """
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if last and not may_be_torn:
        lines.append(last)
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(parse(line.decode()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            message = f"{path}:{number}: this {what} is damaged: {error}"
            if on_damaged is None:
                raise ArtifactError(message) from None
            on_damaged(message)
    return results
