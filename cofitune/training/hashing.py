"""SHA-256 of tensors, also of those that ZeRO stage 3 shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from cofitune.distributed import rank_or_zero, world_size_or_one
from cofitune.files import sha256_json
from cofitune.softmask.factors import Factor
from cofitune.zero import gathered

HASHED_AT_ONCE = 4


def hash_parameters(model: nn.Module, names: Iterable[str], held: Mapping[str, Factor] | None = None) -> dict[str, str]:
    """sha256 of each named parameter's bytes. Every rank must call and gets the same answer.

    Parameters are gathered one at a time; the ranks share the hashing, parameter i falling to rank i mod world.

    Args:
        held: parameters of which only the part with factor 0 is hashed, as `NAME (held part)`.
    """
    parameters = dict(model.named_parameters())
    held_parts = {f"{name} (held part)": (name, factor) for name, factor in (held or {}).items()}
    rank, world = rank_or_zero(), world_size_or_one()
    # sha256 lets go of Python's lock, so a few threads hash while the next parameter is gathered
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        pending = {}
        for index, entry in enumerate([*names, *held_parts]):
            name, factor = held_parts.get(entry, (entry, None))
            with gathered(parameters[name]) as whole:
                if index % world == rank:
                    kept = whole.detach().to("cpu", copy=True)
                    pending[entry] = pool.submit(_hash, factor.part_at_zero(kept) if factor else kept)
                    if len(pending) >= HASHED_AT_ONCE:  # bounds the copies that wait
                        list(pending.values())[-HASHED_AT_ONCE].result()
        mine = {name: future.result() for name, future in pending.items()}
    if world == 1:
        return mine
    parts: list[dict[str, str] | None] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return {name: digest for part in parts if part for name, digest in part.items()}


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, as `hash_parameters` counts them."""
    return _hash(tensor.detach().cpu())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """One sha256 for tensors by name, whatever their order."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return sha256_json(dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True)))


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
