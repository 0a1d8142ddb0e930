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
from typing import IO, Any

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.cofitune\.tmp")
HELD = "held"  # the file in a temporary folder that its owner has locked


def beside(path: Path) -> Path:
    """A name for a file that will be put in place of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.cofitune.tmp")


def hold(file: IO[Any]) -> bool:
    """Lock an open file for as long as it is open; False where another process holds it, or none can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path, below: bool = True) -> None:
    """Remove the temporary files in a folder whose writers were killed; those of living ones stay.

    Args:
        below: also those in its subfolders.
    """
    for path in folder.glob("**/.*.cofitune.tmp" if below else ".*.cofitune.tmp"):
        if not TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError):
            with path.open("rb") as file:
                left = hold(file)
            if left:
                path.unlink()


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
