"""The files of a checkpoint: whole tensors that rank 0 writes, or pieces of them that each rank writes by itself.

Either form is read by any number of ranks. Pieces spare the gathering, and have all ranks write at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Required, TypedDict, TypeVar

from torch import Tensor

from cofitune.errors import ArtifactError, UserError, WriteError
from cofitune.files import read_json, sha256_file, sha256_json, write_json, write_tensors
from cofitune.training.checkpoint_folders import empty
from cofitune.training.finite import check_finite

FORMATS = (1, 2)  # 2: with pieces
FILE_BYTES = 2 * 2**30  # one file's tensors are held in host memory until it is written
MANIFEST = "manifest.json"
RANDOM = "random.safetensors"
SHARED = "shared"  # what tells the ranks, while they write, that they see one folder
MASTER = "master"
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        step: optimizer steps that were taken.
        world_size: ranks that took them.
        identity: whose training this is, as JSON values.
        sha256: name of a file → its hash.
        tensors: name of a trained parameter → the file that holds it whole.
        pieces: or the pieces that it lies in: first element, elements, file.
        zero_stage: under which it was trained; None where an earlier version did not keep it.
        shared: whether every rank sees these very files, as `find_newest` has made sure of.
    """

    folder: Path
    step: int
    world_size: int
    identity: dict[str, object]
    sha256: dict[str, str]
    tensors: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    zero_stage: int | None = None
    shared: bool = False

    @property
    def files(self) -> list[str]:
        """The names of all files but the manifest."""
        named = {*self.tensors.values(), *(file for part in self.pieces.values() for *_, file in part)}
        return [*self.sha256, *sorted(named - self.sha256.keys())]


class Places(TypedDict, total=False):
    """What a checkpoint's manifest says of its files: `tensors` or `pieces`, as in `Checkpoint`, and their hashes."""

    tensors: dict[str, str]
    pieces: dict[str, list[tuple[int, int, str]]]
    sha256: Required[dict[str, str]]


def write_whole(folder: Path, tensors: Iterable[tuple[str, Mapping[str, Tensor]]]) -> Places:
    """Fill a folder with whole tensors, given by their parameters' names; what the manifest says of them.

    Raises:
        UserError: a value is not finite, or the disk is full.
    """
    empty(folder)  # what a killed process left
    files = _Files(folder, "state")
    places = {name: files.add(name, {f"{name}/{kind}": t for kind, t in parts.items()}) for name, parts in tensors}
    files.finish()
    return {"tensors": places, "sha256": files.sha256}


def write_pieces(folder: Path, rank: int, pieces: Iterable[tuple[str, int, Mapping[str, Tensor]]]) -> Places:
    """Write a rank's pieces: of each its parameter's name, its first element in it, and its tensors.

    Returns:
        What the manifest says of them.

    Raises:
        UserError: a value is not finite, or the disk is full.
    """
    files = _Files(folder, f"rank-{rank:05d}")
    places: dict[str, list[tuple[int, int, str]]] = {}
    for name, start, parts in pieces:
        file = files.add(name, {piece_key(name, kind, start): tensor for kind, tensor in parts.items()})
        places.setdefault(name, []).append((start, parts[MASTER].numel(), file))
    files.finish()
    return {"pieces": places, "sha256": files.sha256}


def write_checkpoint(
    folder: Path, places: Places, states: Sequence[Mapping[str, Tensor]], content: Mapping[str, object]
) -> None:
    """Write what is left of a checkpoint: the ranks' random numbers, and the manifest, which makes it one.

    Args:
        places: what `write_whole` or `write_pieces` gave.
        states: of each rank.
    """
    random = {f"{rank}/{kind}": tensor for rank, part in enumerate(states) for kind, tensor in part.items()}
    hashes = {**places["sha256"], RANDOM: write_tensors(folder / RANDOM, random)}
    (folder / SHARED).unlink(missing_ok=True)
    version = FORMATS[1] if "pieces" in places else FORMATS[0]
    manifest = {"format": version, **content, **places, "sha256": hashes}
    write_json(folder / MANIFEST, {**manifest, "manifest_sha256": sha256_json(manifest)})


def or_nothing(temporary: Path, step: int, write: Callable[[], T]) -> T:
    """Write into a temporary folder; where that fails, leave nothing and say why.

    Raises:
        UserError: the disk is full, or cannot be written, or a value is not finite.
    """
    try:
        return write()
    except (OSError, UserError) as error:
        with suppress(OSError):
            empty(temporary)
        what = "cannot be written" if isinstance(error, OSError | WriteError) else "is not written"
        reason = error.reason if isinstance(error, WriteError) else error
        raise UserError(f"{temporary.parent}: the checkpoint of step {step} {what}: {reason}") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        ArtifactError: it is missing or damaged, or of another format.
    """
    manifest = read_json(folder / MANIFEST, "checkpoint's manifest")
    if manifest.pop("manifest_sha256", None) != sha256_json(manifest):
        raise ArtifactError(f"{folder}/{MANIFEST}: this checkpoint's manifest is damaged: its checksum differs")
    if manifest.pop("format") not in FORMATS:
        raise ArtifactError(f"{folder}: this checkpoint is of none of the formats {FORMATS}, which we read")
    return Checkpoint(folder, **manifest)


def check_files(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare files with their hashes.

    Args:
        names: of `checkpoint.files`.

    Raises:
        ArtifactError: one is missing, or has other bytes than were written.
    """
    for name in names:
        path = checkpoint.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: this file of the checkpoint is missing")
        if sha256_file(path) != checkpoint.sha256.get(name):
            raise ArtifactError(f"{path}: its bytes are not those that were written")


def piece_key(name: str, kind: str, start: int) -> str:
    """What a piece of a parameter's tensor is called in its file."""
    return f"{name}/{kind}/{start}"


class _Files:
    """Tensors in files of limited size, each written as soon as it is full."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._waiting: dict[str, Tensor] = {}
        self.sha256: dict[str, str] = {}

    def add(self, parameter: str, tensors: Mapping[str, Tensor]) -> str:
        """Take a parameter's tensors, by their names in the file; returns the file's name."""
        for name, tensor in tensors.items():
            kind = name.removeprefix(f"{parameter}/").partition("/")[0]
            check_finite(parameter if kind == MASTER else f"{parameter} ({kind})", tensor)
        self._waiting.update(tensors)
        file = self._name()
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= FILE_BYTES:
            self.finish()
        return file

    def finish(self) -> None:
        """Write what is left."""
        if self._waiting:
            name = self._name()
            self.sha256[name] = write_tensors(self._folder / name, self._waiting)
            self._waiting = {}

    def _name(self) -> str:
        return f"{self._prefix}-{len(self.sha256) + 1:05d}.safetensors"
