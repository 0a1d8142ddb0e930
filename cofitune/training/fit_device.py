"""What a device's memory leaves room for: the ZeRO stage, and how many layers compute their activations again."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from cofitune.distributed import all_reduce_min, device_of, world_size_or_one
from cofitune.host_memory import free_memory
from cofitune.ranks import this_rank
from cofitune.training.memory import Footprint

SHARE = 0.9  # of a device that an estimate may fill


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
