"""Errors that are the user's to mend: one clear message, exit code 2, no traceback. Anything else is our bug."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping
from pathlib import Path


class UserError(Exception):
    """Something the user gave is wrong: the message says what, where, and what would be right.

    Attributes:
        everywhere: rank 0 has met the same, and its word is enough.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(UserError):
    """One or more mistakes in a config file or an override, reported together."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "" if len(problems) == 1 else f"{len(problems)} mistakes in the config:\n"
        super().__init__(head + "\n".join(f"  - {p}" if head else p for p in problems))


class DataError(UserError):
    """A data file that is missing, does not parse, or holds items that cannot be used (file:line)."""


class RegionError(UserError):
    """A region that matches nothing, or lies outside the model."""


class UnusableModelError(UserError):
    """A model whose files are there and cannot be used as they are."""


class ArtifactError(UserError):
    """A file of ours (delta, importance, store) that is missing, damaged, or belongs to another model or config."""


class WriteError(UserError):
    """A file cannot be written: the disk is full, the place read-only, or its folder was deleted.

    Attributes:
        reason: which of them, in words.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{path}: cannot be written: {reason}")


REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
    errno.EMFILE, errno.ENFILE, errno.ESTALE,
}  # fmt: skip


def refused_by_machine(error: OSError) -> UserError | None:
    """A full disk, a read-only place or a folder that is gone as a message; None for what may be our bug."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in REFUSED:
        return UserError(f"{place}{error.strerror}")
    if error.errno == errno.ENOENT and error.filename and not Path(str(error.filename)).parent.exists():
        return UserError(f"{place}its folder is gone; was it deleted while the command ran?")
    return None


class RepairWarning(UserWarning):
    """A file of a cache was damaged, and what it held is made anew. Said in one line."""


class Stopped(Exception):
    """A command ended early and in good order because of a signal; the exit code is 128 + `signum`."""

    def __init__(self, message: str, signum: int) -> None:
        self.signum = signum
        super().__init__(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def install(extra: str) -> str:
    """How to install an optional part: the project is on no package index, so from its checkout or its wheel."""
    return f"pip install -e '.[{extra}]' in the checkout, or the wheel with [{extra}]"


def differences(place: str, before: object, now: object) -> list[str]:
    """The leaves in which two nested settings differ, each as `dotted.name is … there and … here`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*now, *before])
        return [d for key in keys for d in differences(f"{place}.{key}".strip("."), before.get(key), now.get(key))]
    return [] if before == now else [f"{place} is {before!r} there and {now!r} here"]
