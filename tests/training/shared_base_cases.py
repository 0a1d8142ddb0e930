"""What each rank of test_held runs: trials on fresh models, then on one held model, in one process; and a report."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SHARDED = Path(__file__).with_name("sharded_cases.py")
REGIONS = (
    ("25%-75%", ("up_proj", "down_proj")),
    ("0%-50%", ("q_proj", "v_proj")),
)
ORDER = (0, 1, 0)
STEPS = 3
WAYS = {  # by number of ranks: ZeRO stage, bf16
    1: tuple((stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True)),
    2: ((1, True), (2, False), (3, False), (3, True)),
}


def load_sharded() -> ModuleType:
    """The cases of test_sharded, whose tiny model, items and settings these are."""
    spec = importlib.util.spec_from_file_location("sharded_cases", SHARDED)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot load {SHARDED}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sharded_cases"] = module
    spec.loader.exec_module(module)
    return module


def trial(sharded: ModuleType, model: Any, number: int, case: Any) -> tuple[str, list[float]]:
    """Train a region on a model object of its own; give the hash of what was trained, and the losses."""
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
    anatomy, region = anatomy_of(model), resolve_region(layers, modules, sharded.LAYERS)
    names = region.parameter_names(anatomy)
    freeze_outside(model, set(names))
    if number % 2:
        checkpoint_layers(model, anatomy.layout.layers, region.first)
    engine = start_engine(model, sharded.settings_of(case))
    losses: list[float] = []
    plan = replace(sharded.plan_of(case), world_size=torch.distributed.get_world_size(), num_steps=STEPS)
    settings = FitSettings(plan, sharded.SEED, 0)
    fit(engine, sharded.tiny_examples(), settings, lambda record, _: losses.append(record.loss))
    trained = collect(model, names, everywhere=True)
    release(engine)
    free_engine(engine)
    return hash_tensors(trained), losses


def run_way(sharded: ModuleType, stage: int, bf16: bool) -> dict[str, Any]:
    """Each region on a model that was just made; then all of them, some twice, around one held model."""
    from cofitune.training.shared_base import SharedBase

    case = sharded.Case("held", zero_stage=stage, bf16=bf16)

    def made() -> Any:
        return sharded.tiny_model().to(torch.bfloat16 if bf16 else torch.float32)

    alone = [trial(sharded, made(), number, case) for number in range(len(REGIONS))]
    held = SharedBase(made())
    after, bytes_alive = [], []
    for number in ORDER:
        after.append(trial(sharded, held.instantiate(), number, case))
        gc.collect()
        alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
        bytes_alive.append(sum(alive.values()))
    return {
        "stage": stage, "bf16": bf16, "alone": alone, "after": after, "changed": held.changed(), "alive": bytes_alive,
    }  # fmt: skip


def _tensors() -> list[torch.Tensor]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def main() -> None:
    """Run every way; rank 0 writes what came out."""
    from cofitune.files import write_json
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    rank, world_size = start_distributed()
    sharded = load_sharded()
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage for every engine
    results = [run_way(sharded, *way) for way in WAYS[world_size]]
    if rank == 0:
        write_json(Path(sys.argv[1]), results)


if __name__ == "__main__":
    main()
