"""ZeRO-3 with second copies of the weights among the two ranks of each of two "nodes": the worker of `test_hpz.py`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.helpers import freeze_imports
from tests.training import sharded_cases as cases

WORLD = 4
CASES = {
    "plain": (cases.Case("plain"), 1),
    "second": (cases.Case("second"), 2),
    "plain_checkpoints": (cases.Case("plain_checkpoints", mask="update", checkpointing=True, bf16=True), 1),
    "second_checkpoints": (cases.Case("second_checkpoints", mask="update", checkpointing=True, bf16=True), 2),
    "after": (cases.Case("after"), 1),  # an engine without, behind others with
}


def note(losses: list[float], record: Any, _: int) -> None:
    """A step's loss."""
    losses.append(record.loss)


def main() -> None:
    """Each case's losses and weights, and how many second copies there were."""
    from cofitune.files import write_json, write_tensors
    from cofitune.training.delta import collect
    from cofitune.training.engine import release, start_distributed
    from cofitune.training.fit_device import ranks_a_node
    from cofitune.training.loop import FitSettings, fit

    folder = Path(sys.argv[1])
    rank, _ = start_distributed()
    freeze_imports()
    cases.WORLD = WORLD
    for name, (case, hpz) in CASES.items():
        settings = replace(cases.settings_of(case), hpz_ranks=hpz)
        model, names, engine = cases.start_case(case, folder, settings)
        losses: list[float] = []
        fit(engine, cases.tiny_examples(), FitSettings(cases.plan_of(case), cases.SEED, 0), partial(note, losses))
        second = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in model.parameters())
        tensors = collect(model, names)
        release(engine)
        if rank == 0:
            write_tensors(folder / f"{name}.safetensors", tensors)
            write_json(folder / f"{name}.json", {"losses": losses, "second": second})
    counts = [ranks_a_node(torch.device("cpu"))]  # torch's launcher: one node
    for here, local in ((2, rank % 2), (2, rank // 2), (3 if rank == 3 else 1, 0)):  # two nodes; dealt in turn; unequal
        os.environ.update(LOCAL_WORLD_SIZE=str(here), LOCAL_RANK=str(local))
        counts.append(ranks_a_node(torch.device("cpu")))
    write_json(folder / f"node{rank}.json", counts)


if __name__ == "__main__":
    main()
