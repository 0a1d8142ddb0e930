"""What a device's memory leaves room for: the ZeRO stage, and how many layers compute their activations again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from cofitune.distributed import all_reduce_max, all_reduce_min, device_of, world_size_or_one
from cofitune.host_memory import free_memory
from cofitune.ranks import this_rank
from cofitune.training.memory import Footprint

SHARE = 0.9  # of a device that an estimate may fill
HPZ = "zero_hpz_partition_size"  # DeepSpeed's name for it


def device_bytes(world_size: int) -> int:
    """Bytes of a rank's device: a GPU's, or its part of what is free of the host's memory.

    Args:
        world_size: ranks that train, or that a plan is made for.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device_of(this_rank())).total_memory)
    return free_memory() // ranks_here(world_size)


def ranks_here(world_size: int) -> int:
    """Ranks on this machine: all of `world_size`, but where torch's launcher says otherwise."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def smallest_device_bytes(device: torch.device) -> int:
    """The least of the ranks' `device_bytes`, for all to decide alike. Collective where there are several ranks.

    Args:
        device: where the ranks talk.
    """
    return all_reduce_min(device_bytes(world_size_or_one()), device)


def ranks_a_node(device: torch.device) -> int:
    """Ranks on each node, where all nodes have as many and each a row of them; else 1. Collective.

    Args:
        device: where the ranks talk.
    """
    rank, here = this_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    in_a_row = here if here and rank.local_rank == rank.rank % here else 0
    least, most = all_reduce_min(in_a_row, device), all_reduce_max(in_a_row, device)
    return max(1, least) if least == most else 1


def choose_stage(run: Footprint, room: int) -> int:
    """2 where whole weights fit beside the rest, with every layer checkpointed that may be, else 3.

    Args:
        run: with as many layers checkpointed as it may have at most.
        room: bytes of the smallest device.
    """
    if run.settings.offload_param == "cpu":
        return 3
    replicated = replace(run, settings=replace(run.settings, zero_stage=2))
    return 2 if replicated.memory.device <= SHARE * room else 3


def base_may_stay(run: Footprint, room: int) -> bool:
    """Whether the base's weights fit on the device beside a copy of those that train; under stage 3 they are sharded.

    Args:
        room: bytes of the smallest device.
    """
    staying = replace(run, shared_base=True)
    return run.settings.zero_stage < 3 and staying.memory.device <= SHARE * room


def choose_hpz_ranks(run: Footprint, room: int, node: int) -> int:
    """As many ranks as a node has, where a second copy of the weights fits with every layer checkpointed; else 1.

    Args:
        room: bytes of the smallest device.
        node: ranks a node.
    """
    settings, raw = run.settings, run.settings.raw.get("zero_optimization", {})
    several = settings.zero_stage == 3 and 1 < node < run.world_size and run.world_size % node == 0
    if not several or settings.offload_param == "cpu" or (isinstance(raw, Mapping) and HPZ in raw):
        return 1
    second = replace(run, settings=replace(settings, hpz_ranks=node))
    return node if second.memory.device <= SHARE * room else 1


def choose_checkpointed(run: Footprint, room: int) -> int:
    """The fewest layers that must compute their activations again for the run to fit; all where none would do.

    Where the estimate does not know what a layer keeps, all do.

    Args:
        room: bytes of the smallest device.
    """
    if not run.activations.is_known:
        return run.depth
    for count in range(run.depth):
        if replace(run, checkpointed=count).memory.device <= SHARE * room:
            return count
    return run.depth
