"""The ranks' sums on disk, so that an interrupted estimation continues where it was and ends with the same vectors."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from cofitune.checked import read_checked_tensors, write_checked_tensors
from cofitune.errors import ArtifactError, RepairWarning
from cofitune.importance.sums import Sums

COUNTS = "counts"
SUMS_FORMAT = 2  # 2: two halves; what an earlier version left is not gone on from


def save_sums(path: Path, sums: Sums, identity: str) -> None:
    """Write the sums atomically, in the fp64 they are added up in.

    Args:
        identity: names everything that the sums depend on.
    """
    counts = torch.tensor([sums.tokens, sums.samples, sums.micro_batches])
    write_checked_tensors(path, {**sums.values, COUNTS: counts}, {"identity": identity})


def sums_path(folder: Path, rank: int | str, world_size: int, sharded: bool) -> Path:
    """Where a rank's sums lie: those of other ranks, or of weights that lay otherwise, would not end with its bits."""
    return folder / f"{rank}-of-{world_size}{'-zero3' if sharded else ''}.safetensors"


def has_sums(folder: Path, world_size: int, sharded: bool, identity: str) -> bool:
    """Whether any of so many ranks has left sums of this identity here."""
    pattern = sums_path(folder, "*", world_size, sharded).name
    return any(load_sums(path, identity) is not None for path in folder.glob(pattern))


def load_sums(path: Path, identity: str) -> Sums | None:
    """Read the sums again; None where there are none of this identity, or where they are damaged, which is said."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_checked_tensors(path, "file of an interrupted run's sums")
    except ArtifactError as error:
        warnings.warn(f"begun anew: {error}", RepairWarning, stacklevel=1)
        return None
    if metadata.get("identity") != identity:
        return None
    tokens, samples, micro_batches = tensors.pop(COUNTS).tolist()
    return Sums(tensors, tokens, samples, micro_batches)
