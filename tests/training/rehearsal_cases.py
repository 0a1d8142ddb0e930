"""Trainings with rehearsal that two real ranks and one plain PyTorch process both compute, and the ranks' worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cofitune.data.batches import Plan, RehearsalMix, plan_steps
from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import join
from tests.helpers import freeze_imports
from tests.training import sharded_cases as sharded

TOP_K = 5


@dataclass(frozen=True)
class RehearsalCase(sharded.Case):
    """One way to train with rehearsal."""

    kind: str = "nll"
    weight: float = 1.0
    packed: bool = False
    share: float = 0.2

    def row(self) -> str:
        """The case as the first columns of a table."""
        packed = "packs" if self.packed else "items"
        return f"{super().row()}  {self.kind:3}  w {self.weight:<4g}  {packed}"


ALL = sharded.ALL_MODULES
CASES = (
    *(
        RehearsalCase(f"rehearsal_{kind}_stage_{stage}", zero_stage=stage, modules=ALL, kind=kind, weight=weight)
        for (stage, kind), weight in zip(product((1, 2, 3), ("nll", "kl")), (0.5, 2.0, 3.0, 0.7, 0.5, 2.0), strict=True)
    ),
    RehearsalCase("rehearsal_nll_update", "update", zero_stage=2, modules=ALL, kind="nll", weight=2.0, share=0.4),
    RehearsalCase("rehearsal_kl_update", "update", modules=ALL, kind="kl", weight=0.5, checkpointing=True, share=0.4),
    RehearsalCase("rehearsal_kl_prefix", "gradient", kind="kl", weight=2.0, prefix_cache=True),
    RehearsalCase("rehearsal_nll_packed", zero_stage=2, kind="nll", weight=0.5, packed=True),
    RehearsalCase("rehearsal_kl_packed", "update", modules=ALL, kind="kl", weight=2.0, packed=True),
)


def rehearsed_items(kind: str) -> list[Example]:
    """Five items; what is stored of the base is another model's than the one that is trained, so that it pulls."""
    from cofitune.training.loss import top_k_of

    generator = torch.Generator().manual_seed(99)
    items = []
    for length, prompt in ((11, 3), (6, 2), (19, 4), (8, 5), (23, 2)):
        ids = torch.randint(0, sharded.VOCAB, (length,), generator=generator).tolist()
        logits = 2 * torch.randn(length - prompt, sharded.VOCAB, generator=generator)
        stored = top_k_of(logits, TOP_K) if kind == "kl" else None
        items.append(Example(ids, [IGNORED] * prompt + ids[prompt:], top_k=stored))
    return items


def parts_of(case: RehearsalCase) -> tuple[list[list[Example]], list[list[Example]]]:
    """The items of each example of the task, and of the rehearsal: of a pack several."""
    task, rehearsed = sharded.tiny_examples(), rehearsed_items(case.kind)
    if not case.packed:
        return [[item] for item in task], [[item] for item in rehearsed]
    cut = ((0, 1), (2,), (3,), (4, 5), (6,), (7,), (8, 9), (10,), (11,), (12,))
    return [[task[i] for i in pack] for pack in cut], [[rehearsed[i] for i in pack] for pack in ((0, 1), (2,), (3, 4))]


def examples_of(case: RehearsalCase) -> list[Example]:
    """What is trained on, the task's first: items, or packs of them."""
    return [join(parts) if case.packed else parts[0] for kind in parts_of(case) for parts in kind]


def plan_of(case: RehearsalCase) -> Plan:
    """Seven steps, every other of which is short: then a rank has a micro-batch of the rehearsal without an item."""
    task, rehearsed = parts_of(case)
    mix = RehearsalMix(len(task), len(rehearsed), case.share)
    return plan_steps(len(task), sharded.MICRO, case.accumulation, sharded.WORLD, 1, sharded.STEPS, rehearsal=mix)


def run_case(case: RehearsalCase, folder: Path) -> None:
    """Train one case on this rank; rank 0 writes every parameter and the losses."""
    from cofitune.files import write_json, write_tensors
    from cofitune.model.anatomy import anatomy_of
    from cofitune.training.delta import collect
    from cofitune.training.loop import FitSettings, RehearsalLoss, StepRecord, fit
    from cofitune.training.prefix_cache import PrefixCache, PrefixPlan

    plan = plan_of(case)
    settings = replace(sharded.settings_of(case), rehearsal_micro_batches=plan.rehearsal_micro_batches)
    model, _, engine = sharded.start_case(case, folder, settings)
    examples: Sequence[Example] = examples_of(case)
    anatomy, lengths = anatomy_of(model), [len(e.input_ids) for e in examples]
    first = sharded.region_of(case).first
    kept = PrefixPlan(anatomy.layout.layers, first, lengths, anatomy.hidden_size, settings.dtype, folder)
    prefix = PrefixCache(model, kept) if case.prefix_cache else None
    records: list[dict[str, Any]] = []

    def on_step(record: StepRecord, _: int) -> None:
        records.append(record.as_dict())

    loss = RehearsalLoss(case.kind, case.weight)
    fit(engine, examples, FitSettings(plan, sharded.SEED, 0, rehearsal=loss), on_step, prefix=prefix)
    tensors = collect(model, [n for n, _ in model.named_parameters()])
    if torch.distributed.get_rank() == 0:
        write_tensors(folder / f"{case.name}.safetensors", tensors)
        write_json(folder / f"{case.name}.json", records)
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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
