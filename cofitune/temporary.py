"""Temporary files and folders that outlive nobody: what a killed process left is taken away by the next one."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, AnyStr

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.cofitune\.tmp")
HELD = "held"  # the file in a temporary folder that its owner has locked
BUILDING = ".building"  # how the name of a folder ends that is being written
BUILDER = ".cofitune-held"  # the file in it that its writer has locked


def beside(path: Path) -> Path:
    """A name for a file that will be put in place of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.cofitune.tmp")


def open_held(path: Path) -> tuple[Path, IO[bytes]]:
    """Make a temporary file beside `path`, and hold it while it is open: no cleaner takes a living writer's file.

    Returns:
        Its name, and the open file.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        temporary = beside(path)
        file = temporary.open("xb")
        with suppress(OSError):  # a file system that knows no locks: no cleaner removes anything there
            fcntl.flock(file, fcntl.LOCK_EX)
        if is_at(file, temporary):
            return temporary, file
        file.close()  # a cleaner was here between the two, and took it for a leftover


def is_at(file: IO[AnyStr], path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def hold(file: IO[AnyStr]) -> bool:
    """Lock an open file for as long as it is open; False where another process holds it, or none can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path, below: bool = True) -> None:
    """Remove the temporary files and half-written folders in a folder whose writers were killed; living ones' stay.

    Args:
        below: also those in its subfolders.
    """
    for path in folder.glob(f"**/.*{BUILDING}" if below else f".*{BUILDING}"):
        with suppress(OSError), (path / BUILDER).open("rb") as file:  # another's folder of that name has no such file
            if hold(file):
                shutil.rmtree(path, ignore_errors=True)
                _remove_lock_of(path)
    for path in folder.glob("**/.*.cofitune.tmp" if below else ".*.cofitune.tmp"):
        if not TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError), path.open("rb") as file:
            if hold(file):
                path.unlink()  # while it is held: who is just making it sees that it is gone


def _remove_lock_of(building: Path) -> None:
    """Take away the lock file that the killed writer of a folder has left, unless somebody else has taken the lock."""
    path = building.with_name(f"{building.name.removesuffix(BUILDING)}.lock")
    with suppress(OSError), path.open("rb") as file:
        if hold(file):
            path.unlink()


@contextmanager
def built_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill and then, by `put_in_place`, to move there; else it goes with the context.

    Where the process is killed it stays, until `remove_leftovers` or the next one with this target finds it. The caller
    holds the lock of `target`.
    """
    building = target.with_name(f".{target.name}{BUILDING}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        with (building / f"{BUILDER}.new").open("wb") as held:
            hold(held)
            (building / f"{BUILDER}.new").rename(building / BUILDER)  # which is locked from its first moment on
            yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def put_in_place(building: Path, target: Path) -> None:
    """Move a folder of `built_folder` to its place, whose present folder goes."""
    if target.exists():
        shutil.rmtree(target)
    (building / BUILDER).unlink()
    building.rename(target)


@contextmanager
def temporary_folder(prefix: str, folder: Path | None = None) -> Iterator[Path]:
    """A folder for a while; those of the same prefix whose processes were killed are taken away first.

    Args:
        folder: where it is made; None: in the system's temporary folder.
    """
    parent = folder or Path(tempfile.gettempdir())
    _remove_abandoned(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        path = Path(name)
        with (path / f".{HELD}").open("wb") as held:
            hold(held)
            (path / f".{HELD}").rename(path / HELD)  # which is locked from its first moment on
            yield path


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove this user's folders that nobody holds; one without the locked file is just being made."""
    with suppress(OSError):
        for path in parent.glob(f"{prefix}*"):
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                continue
            with suppress(OSError), (path / HELD).open("rb") as file:
                if hold(file):
                    shutil.rmtree(path, ignore_errors=True)
