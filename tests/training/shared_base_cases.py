"""What each rank of test_held runs: trials on fresh models, then on one held model, in one process; and a report."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers import freeze_imports
from tests.training import sharded_cases as sharded

REGIONS = (
    ("25%-75%", ("up_proj", "down_proj")),
    ("0%-50%", ("q_proj", "v_proj")),
    ("0%-25%", ("down_proj",)),  # one tensor, in which DeepSpeed would train as it is
)
ORDER = (0, 1, 2, 0)
STEPS = 3
WAYS = {  # by number of ranks: ZeRO stage, bf16
    1: tuple((stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True)),
    2: ((1, True), (2, False), (3, False), (3, True)),
}


def trial(make: Callable[[list[str]], Any], number: int, case: Any, shared: list[bool]) -> tuple[str, list[float]]:
    """Train a region on a model object of its own; give the hash of what was trained, and the losses.

    Args:
        make: gives the model, by the names of what trains.
        shared: is told whether what is frozen lies where it lay when the model was made.
    """
    from dataclasses import replace

    from cofitune.model.anatomy import anatomy_of
    from cofitune.model.region import freeze_outside, resolve_region
    from cofitune.training.delta import collect
    from cofitune.training.engine import checkpoint_layers, release, start_engine
    from cofitune.training.hashing import hash_tensors
    from cofitune.training.loop import FitSettings, fit
    from cofitune.zero import free_engine

    torch.manual_seed(1)
    layers, modules = REGIONS[number]
    anatomy, region = anatomy_of(sharded.tiny_model()), resolve_region(layers, modules, sharded.LAYERS)
    names = region.parameter_names(anatomy)
    model = make(names)
    places = {name: p.data_ptr() for name, p in model.named_parameters() if name not in names}
    freeze_outside(model, set(names))
    if number % 2:
        checkpoint_layers(model, anatomy.layout.layers, region.first)
    engine = start_engine(model, sharded.settings_of(case))
    shared.append(all(model.get_parameter(name).data_ptr() == place for name, place in places.items()))
    losses: list[float] = []
    plan = replace(sharded.plan_of(case), world_size=torch.distributed.get_world_size(), num_steps=STEPS)
    settings = FitSettings(plan, sharded.SEED, 0)
    fit(engine, sharded.tiny_examples(), settings, lambda record, _: losses.append(record.loss))
    trained = collect(model, names, everywhere=True)
    release(engine)
    free_engine(engine)
    return hash_tensors(trained), losses


def run_way(stage: int, bf16: bool) -> dict[str, Any]:
    """Each region on a model that was just made; then all of them, some twice, around one held model."""
    from cofitune.training.shared_base import SharedBase

    case = sharded.Case("held", zero_stage=stage, bf16=bf16)

    def made() -> Any:
        return sharded.tiny_model().to(torch.bfloat16 if bf16 else torch.float32)

    alone = [trial(lambda _: made(), number, case, []) for number in range(len(REGIONS))]
    held = SharedBase(made())
    after, bytes_alive, shared = [], [], list[bool]()
    for number in ORDER:
        after.append(trial(lambda names: held.instantiate(trains=names), number, case, shared))
        gc.collect()
        alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
        bytes_alive.append(sum(alive.values()))
    return {
        "stage": stage, "bf16": bf16, "alone": alone, "after": after, "changed": held.changed(), "alive": bytes_alive,
        "shared": shared,
    }  # fmt: skip


def _tensors() -> list[torch.Tensor]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def main() -> None:
    """Run every way; rank 0 writes what came out."""
    from cofitune.files import write_json
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    rank, world_size = start_distributed()
    freeze_imports()
    results = [run_way(*way) for way in WAYS[world_size]]
    if rank == 0:
        write_json(Path(sys.argv[1]), results)


if __name__ == "__main__":
    main()
