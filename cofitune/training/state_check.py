"""The newest whole checkpoint: looked for by one process, or by ranks of which each checks its share of the files.

Ranks share the checking where they see the very same files; a copy on a disk of their own would prove nothing of those
that rank 0 has. They are the same where the manifest has the same number and time of change on its file system, to the
nanosecond: unlike its contents and the time of its contents, no copy keeps both. Where a file system gives each host
numbers of its own, rank 0 checks all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cofitune.distributed import run_on_rank_zero, waiting_group, world_size_or_one
from cofitune.errors import ArtifactError, UserError
from cofitune.training.checkpoint_folders import checkpoint_folders
from cofitune.training.state_files import MANIFEST, Checkpoint, check_files, read_checkpoint

Tell = Callable[[str], None]
T = TypeVar("T")


def newest_whole(folder: Path, tell: Tell) -> Checkpoint | None:
    """The newest checkpoint whose files all have the bytes that were written; None where there is none.

    Args:
        tell: is told of every damaged one that is passed over.
    """
    for path in checkpoint_folders(folder):
        try:
            result = read_checkpoint(path)
            check_files(result, result.files)
        except ArtifactError as error:
            tell(_damaged(error))
            continue
        return result
    return None


def find_newest(folder: Path, tell: Tell) -> Checkpoint | None:
    """As `newest_whole`, on every rank alike: each checks its share of the files. Collective.

    Args:
        folder: where this rank sees the checkpoints, or would.
        tell: on rank 0, is told of every damage that any rank has found.

    Returns:
        Of each rank with the folder that it sees.

    Raises:
        UserError: a file cannot be read, for another reason than that it is gone; on every rank.
    """
    if world_size_or_one() == 1:
        return newest_whole(folder, tell)
    for name in run_on_rank_zero(lambda: [path.name for path in checkpoint_folders(folder)]):
        checkpoint, problem = run_on_rank_zero(lambda path=folder / name: _manifest(path))  # type: ignore[misc]
        problems = [problem]
        if checkpoint is not None:
            checkpoint = replace(checkpoint, folder=folder / name, shared=_all_see(folder / name))
            problems = _check_shares(checkpoint)
        found = [one for one in problems if one]
        for one in found:
            if torch.distributed.get_rank() == 0:
                tell(_damaged(one))
        if checkpoint is not None and not found:
            return checkpoint
    return None


def _damaged(what: object) -> str:
    return f"damaged, so the checkpoint before it is looked for: {what}"


def _manifest(folder: Path) -> tuple[Checkpoint | None, str | None]:
    try:
        return read_checkpoint(folder), None
    except ArtifactError as error:
        return None, str(error)


def _all_see(folder: Path) -> bool:
    """Whether every rank sees the manifest that rank 0 sees, and not a copy."""
    seen: tuple[int, ...] | None = None
    try:
        status = (folder / MANIFEST).stat()
        seen = status.st_ino, status.st_ctime_ns, status.st_size
    except OSError:
        pass
    everyone = _gathered(seen)
    return seen is not None and everyone.count(everyone[0]) == len(everyone)


def _check_shares(checkpoint: Checkpoint) -> list[str | None]:
    """Check this rank's share; of every rank what it found damaged."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    files = checkpoint.files if rank == 0 or checkpoint.shared else []
    share = files[rank::world_size] if checkpoint.shared else files
    damage: str | None = None
    refused: str | None = None
    try:
        check_files(checkpoint, share)
    except ArtifactError as error:
        damage = str(error)
    except OSError as error:
        refused = f"{error.filename or checkpoint.folder}: this file of the checkpoint cannot be read: {error.strerror}"
    everyone = _gathered((damage, refused))
    for number, (_, reason) in enumerate(everyone):
        if reason:
            raise UserError(f"rank {number}: {reason}", everywhere=rank != 0)
    return [damage for damage, _ in everyone]


def _gathered(own: T) -> list[T]:
    """Of every rank what it gives, however long one takes."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own, group=waiting_group())
    return everyone
