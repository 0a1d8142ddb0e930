"""Files that are whole or absent: every write-out goes to a temporary file, is fsynced and renamed into place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cofitune.errors import ArtifactError, UserError, WriteError
from cofitune.temporary import is_at, open_held

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "checksum"  # of JSON that we wrote, in it
DEEPEST = 100  # levels of JSON that is read; ours has about ten


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A process that dies on the way leaves the old file, or none, but never half a file. The file's mode is the umask's.

    Raises:
        WriteError: the disk is full, or the place cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, held = open_held(path)
        with held:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise WriteError(path, error.strerror or str(error)) from error
    finally:
        with suppress(OSError):
            if temporary:
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, indented, in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically (`format: pt`, so that transformers reads it).

    Returns:
        The sha256 of its bytes, taken while they are written: reading them again would double the time.
    """
    from cofitune.tensor_bytes import safetensors_parts

    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for part in safetensors_parts(tensors, {"format": "pt", **(metadata or {})}):
                file.write(part)
                digest.update(part)

    write_atomically(path, write)
    return digest.hexdigest()


def read_json(path: Path, what: str, *, ours: bool = True) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    One that we wrote may carry its checksum (cofitune/checked.py), which is compared and left out.

    Args:
        what: names it in messages.
        ours: whether we wrote it, or a version of us that knew no checksums.

    Raises:
        ArtifactError: it is missing, does not parse, holds something else, or is not what was written.
    """
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
        if _is_deep(value):
            raise RecursionError
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no {what} here") from None
    except OSError as error:
        raise ArtifactError(f"{path}: this {what} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        deep = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ArtifactError(f"{path}: this {what} is damaged: {deep}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: this {what} is damaged: it must hold an object, not {value!r:.40}")
    expected = value.pop(CHECKSUM, None) if ours else None
    if expected is not None and expected != sha256_json(value):
        raise ArtifactError(f"{path}: this {what} is damaged: it is not what was written (its checksum differs)")
    return value


def _is_deep(value: object) -> bool:
    """Whether lists and objects lie in each other more than `DEEPEST` times: hashing or writing it again would fail."""
    level = [value]
    for _ in range(DEEPEST):
        inside = (v for v in level if isinstance(v, dict | list))
        level = [part for v in inside for part in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a whole safetensors file of ours to the CPU.

    Raises:
        ArtifactError: it is missing, truncated or no safetensors file; `what` names it in the message.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no {what} here") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: this {what} is damaged: {error}") from None


def remove_files(folder: Path, *names: re.Pattern[str]) -> None:
    """Take away the files of these names, and the folder where nothing else lies in it; there may be none."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file() and any(name.fullmatch(path.name) for name in names):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hash a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_checksum(content: Mapping[str, object]) -> dict[str, object]:
    """The content as JSON gives it back, and beside it the sha256 of all of it."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != CHECKSUM}))
    return {**plain, CHECKSUM: sha256_json(plain)}


def write_checked_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON with its checksum, which `read_json` compares, atomically."""
    write_json(path, with_checksum(content))


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder's lock: two processes must not write one folder. The system frees it when the process ends.

    The lock file lies beside the folder, so that emptying the folder does not remove the lock.

    Args:
        what: names in the message what is done there.

    Raises:
        UserError: another process holds it.
    """
    path = folder.parent / f".{folder.name}.lock"
    made = [parent for parent in path.parents if not parent.exists()]  # the deepest first
    try:
        with _open_lock(path, folder, what) as file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
    finally:
        remove_free_lock(folder)
        with suppress(OSError):
            for parent in made:  # a mistake found before anything was written leaves no empty folder
                parent.rmdir()


def remove_free_lock(folder: Path) -> None:
    """Take a folder's lock file away, unless somebody holds it: a child may outlive us."""
    path = folder.parent / f".{folder.name}.lock"
    with suppress(OSError), path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(file, path):
            path.unlink()  # locked meanwhile: who waits for it sees that the file is another one


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same path, whose file goes with the last one.

    Where the file system knows no locks, nobody waits.
    """
    file = path.open("a+")
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
        while not is_at(file, path):  # its holder has taken it away while we waited
            file.close()
            file = path.open("a+")
            fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def check_unlocked(folder: Path, what: str) -> None:
    """Find out early whether another process is writing a folder.

    Raises:
        UserError: one holds its lock.
    """
    path = folder.parent / f".{folder.name}.lock"
    if path.is_file():
        _open_lock(path, folder, what, fcntl.LOCK_SH).close()  # shared: ranks look at the same time


def _open_lock(path: Path, folder: Path, what: str, kind: int = fcntl.LOCK_EX) -> IO[str]:
    """The open lock file, locked where the file system knows locks."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from error
        os.set_inheritable(file.fileno(), True)  # a child that outlives a killed process still holds the lock
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            if is_at(file, path):
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(
                f"{folder}: another {what} is writing here{f' (process {holder})' if holder else ''}; "
                "wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system that knows no locks
                raise
            return file
        file.close()  # its holder has ended and taken it away since it was opened


def gib(count: float) -> str:
    """Bytes as GiB, or MiB below one GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def cache_folder() -> Path:
    """`$COFITUNE_CACHE`, or `cofitune` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("COFITUNE_CACHE") or Path(home) / "cofitune")
