"""Ranks whose devices differ: the worker of `test_activations.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.helpers import freeze_imports


def main() -> None:
    """Each rank writes what it takes for the smallest device; rank 1's is the larger."""
    from cofitune.training import fit_device
    from cofitune.training.engine import start_distributed

    rank, _ = start_distributed()
    freeze_imports()
    fit_device.device_bytes = lambda world_size: 10**12 * (rank + 1)  # beyond 32 bits
    found = fit_device.smallest_device_bytes(torch.device("cpu"))
    (Path(sys.argv[1]) / f"{rank}.txt").write_text(str(found))


if __name__ == "__main__":
    main()
