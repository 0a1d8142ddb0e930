"""Which rank this process is, by the variables that torchrun (and our own launcher) set. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Rank:
    """This process among those that a launcher started; rank 0 of 1 when nobody did."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def device(self, num_devices: int) -> int:
        """Which of the GPUs that this process sees is its own; a scheduler may show each rank its own alone, as 0."""
        return self.local_rank % num_devices


def is_launched() -> bool:
    """Whether a launcher started this process as a rank. WORLD_SIZE alone, which job scripts export, says nothing."""
    return all(os.environ.get(name, "").isdigit() for name in VARIABLES)


def this_rank() -> Rank:
    """Read the environment: all three variables or none."""
    return Rank(*(int(os.environ[name]) for name in VARIABLES)) if is_launched() else Rank()
