"""Checkpoints that each rank writes its own pieces of, where the ranks share a disk."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cofitune.distributed import all_reduce_min, run_on_rank_zero, waiting_group
from cofitune.errors import UserError, WriteError
from cofitune.files import write_text
from cofitune.training.checkpoint_folders import empty
from cofitune.training.moments import read_moment
from cofitune.training.state_files import MASTER, SHARED, Places, or_nothing, write_pieces
from cofitune.zero import MOMENTS, Flat, flats

if TYPE_CHECKING:
    from cofitune.zero import Engine

KINDS = (MASTER, *MOMENTS)
Written = tuple[Places, tuple[bool, str] | None]  # what the manifest says of it, or the problem


def stretch(engine: Engine, flat: Flat, kind: str, place: slice) -> Tensor:
    """A stretch of a flat tensor's fp32 weights, or of one of its moments."""
    return flat.tensor.data[place] if kind == MASTER else read_moment(engine, flat, kind, place)


def all_see(folder: Path, step: int, device: torch.device) -> bool:
    """Begin a checkpoint's folder; whether every rank sees it, as on a disk that they share. Collective.

    Args:
        device: where the ranks talk.
    """

    def begin() -> str:
        empty(folder)  # what a killed process left
        token = secrets.token_hex(8)
        write_text(folder / SHARED, token)
        return token

    token = run_on_rank_zero(lambda: or_nothing(folder, step, begin))
    try:
        sees = (folder / SHARED).read_text(encoding="utf-8") == token
    except OSError:
        sees = False
    return bool(all_reduce_min(int(sees), device))


def write_own_pieces(folder: Path, engine: Engine) -> list[Written]:
    """Write this rank's shards. Collective.

    Returns:
        Of every rank what it wrote, or why it could not: whether by the disk, and the reason.
    """
    own: Places = {"sha256": {}}
    problem: tuple[bool, str] | None = None
    try:
        own = write_pieces(folder, torch.distributed.get_rank(), _own_pieces(engine))
    except WriteError as error:
        problem = True, error.reason
    except (OSError, UserError) as error:
        problem = isinstance(error, OSError), str(error)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (own, problem), group=waiting_group())
    return everyone


def _own_pieces(engine: Engine) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Of each shard of this rank its parameter, its first element, and its three tensors."""
    for flat in flats(engine):
        for shard in flat.shards:
            place = slice(shard.offset, shard.offset + shard.numel)
            yield shard.name, shard.start, {kind: stretch(engine, flat, kind, place).cpu() for kind in KINDS}


def joined(everyone: list[Written]) -> Places:
    """What all ranks wrote, as the manifest has it.

    Raises:
        UserError: one could not.
    """
    pieces: dict[str, list[tuple[int, int, str]]] = {}
    hashes: dict[str, str] = {}
    for rank, (own, problem) in enumerate(everyone):
        if problem is not None:
            by_disk, reason = problem
            raise WriteError(f"rank {rank}", reason) if by_disk else UserError(reason)
        hashes |= own["sha256"]
        for name, part in own["pieces"].items():
            pieces.setdefault(name, []).extend(part)
    return {"pieces": pieces, "sha256": hashes}
