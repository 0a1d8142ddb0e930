"""Fused tensors of which a part trains, on two real ranks: the cases, and the worker that runs them on a rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.helpers import freeze_imports
from tests.model import test_layouts as layouts


@dataclass(frozen=True)
class Case:
    """A family's part-region (`modules` of layer 1) under one mask and one ZeRO stage."""

    family: str
    stage: int
    mask: str
    modules: tuple[str, ...]
    axis: str = "rows"

    @property
    def name(self) -> str:
        return f"{self.family}-{self.stage}-{self.mask}-{self.modules[0]}-{self.axis}"


CASES = tuple(
    Case(family, stage, mask, part, axis)
    for family in ("phi3", "gpt_neox", "gpt2", "falcon")  # a fused tensor of each kind: others have none of their own
    for stage, mask, part, axis in (
        (2, "update", layouts.PARTS[0], "rows"),
        (2, "gradient", layouts.PARTS[1], "rows"),
        (3, "update", layouts.PARTS[0], "rows"),
        (3, "gradient", layouts.PARTS[0], "rows"),
        (3, "update", layouts.PARTS[1], "rows"),
        (1, "update", layouts.PARTS[0], "columns"),
        (2, "gradient", layouts.PARTS[0], "columns"),
        (3, "update", layouts.PARTS[1], "columns"),
    )
)


def run_case(case: Case, folder: Path) -> None:
    """Train two steps of four items, two a rank; rank 0 writes every parameter."""
    from cofitune.data.batches import plan_steps
    from cofitune.data.chat import Example
    from cofitune.files import write_tensors
    from cofitune.model.anatomy import anatomy_of
    from cofitune.model.region import freeze_outside, resolve_region
    from cofitune.softmask.columns import build_column_factors
    from cofitune.softmask.factors import build_factors, freeze_factors, join
    from cofitune.softmask.gradient import mask_gradients
    from cofitune.softmask.update import mask_updates
    from cofitune.training.delta import collect
    from cofitune.training.engine import start_engine
    from cofitune.training.hashing import hash_parameters
    from cofitune.training.loop import FitSettings, fit
    from cofitune.zero import inner_optimizer, shards

    model = layouts.build(case.family)
    anatomy = anatomy_of(model)
    region = resolve_region("1", case.modules, layouts.L, anatomy.modules)
    build = build_column_factors if case.axis == "columns" else build_factors
    factors = build(layouts.random_importance(anatomy, case.axis), region, region.modules, anatomy)
    held = freeze_factors(region, anatomy)
    freeze_outside(model, set(region.parameter_names(anatomy)))
    mask_gradients(model, join(held, factors if case.mask == "gradient" else {}))
    engine = start_engine(model, replace(layouts.SETTINGS, zero_stage=case.stage, micro_batch=2))
    mask_updates(inner_optimizer(engine), shards(engine), join(held, factors if case.mask == "update" else {}))
    before = hash_parameters(model, [], held)
    examples = [Example(ids, ids) for ids in layouts.random_ids().tolist()]
    fit(engine, examples, FitSettings(plan_steps(4, 2, 1, 2, 1, 2), 0, 0), lambda record, stopped_by: None)
    if not before or hash_parameters(model, [], held) != before:
        raise RuntimeError(f"{case.name}: held rows moved, or there are none")
    tensors = collect(model, [name for name, _ in model.named_parameters()])
    if torch.distributed.get_rank() == 0:
        write_tensors(folder / f"{case.name}.safetensors", tensors)
    engine.destroy()


def main() -> None:
    """What every rank runs: all cases in one start."""
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    start_distributed()
    freeze_imports()
    for case in CASES:
        run_case(case, Path(sys.argv[1]))
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
