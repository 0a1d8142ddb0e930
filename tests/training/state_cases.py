"""Trainings that are interrupted and gone on with, on real ranks: what `test_state.py` compares, and the worker."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers import at_most_bytes, freeze_imports
from tests.training import sharded_cases as sharded

Case, ALL = sharded.Case, sharded.ALL_MODULES
SAVED, STEPS = 3, sharded.STEPS  # of a case: saved after step 3, trained for 5
LONG_SAVED, LONG_STEPS = 3, 10  # of the change of ranks
IDENTITY = {"train": {"learning_rate": 5e-3}}

EIGHT_BIT = (
    Case("8bit", "update", modules=ALL, optimizer="adamw_8bit"),
    Case("8bit_bias_sub_groups", modules=ALL, bias=True, raw_sub_group=5000, optimizer="adamw_8bit"),
    Case("8bit_stage_2_bf16", "update", zero_stage=2, modules=ALL, bf16=True, optimizer="adamw_8bit"),
    Case("8bit_stage_1", zero_stage=1, modules=ALL, optimizer="adamw_8bit"),
)
CASES = (
    *(EIGHT_BIT if importlib.util.find_spec("bitsandbytes") else ()),
    Case("plain"),
    Case("update", "update", modules=ALL),
    Case("gradient", "gradient", modules=ALL, checkpointing=True),
    Case("bias_sub_groups", "update", modules=ALL, bias=True, raw_sub_group=700),
    Case("offload", "update", offload=True),
    Case("sharded_loading", "update", sharded_loading=True),
    Case("bf16", "update", modules=ALL, bf16=True),
    Case("bf16_bias_sub_groups", "update", modules=ALL, bf16=True, bias=True, raw_sub_group=700),
    Case("bf16_offload", "update", bf16=True, offload=True),
    Case("stage_2", "update", zero_stage=2, modules=ALL),
    Case("stage_2_offload", "gradient", zero_stage=2, offload=True),
    Case("stage_2_bf16", "update", zero_stage=2, bf16=True),
    Case("stage_2_bf16_offload", "update", zero_stage=2, bf16=True, offload=True),
    Case("stage_1", "update", zero_stage=1, modules=ALL),
    Case("stage_1_offload", "update", zero_stage=1, offload=True),
    Case("stage_1_bf16", "gradient", zero_stage=1, bf16=True),
)


def run_case(case: Any, folder: Path) -> None:
    """Train without a break; then again from the checkpoint in the middle, in a fresh engine.

    Attention drops weights at random, a different one on each rank, so that the random numbers must come back, too.
    """
    from cofitune.training.state import load_state, save_state
    from cofitune.training.state_check import find_newest, newest_whole

    here = folder / case.name
    settings = sharded.settings_of(case)

    def save_at(engine: Any, into: Path, *steps: int) -> Callable[[Any, int], None]:
        def on_step(record: Any, _: int) -> None:
            if record.step in steps:
                save_state(into, engine, record.step, IDENTITY, save_total_limit=9)
                if into.name == "whole" and record.step == SAVED:
                    save_state(here / "pieces", engine, SAVED, IDENTITY, save_total_limit=9, in_pieces=True)

        return on_step

    model, names, engine = _start(case, folder, settings)
    _fit(engine, sharded.plan_of(case), save_at(engine, here / "whole", SAVED, STEPS))
    _write_weights(model, names, here / "whole.safetensors")
    _check(load_state(engine, find_newest(here / "pieces", print)) == SAVED, f"{case.name}: pieces of another step")
    save_state(here / "from_pieces", engine, SAVED, IDENTITY, save_total_limit=9)
    engine.destroy()

    model, names, engine = _start(case, folder, settings)
    torch.manual_seed(999)
    done = load_state(engine, newest_whole(_only(here / "whole", SAVED, here / "start"), print))
    _check(done == SAVED, f"{case.name}: went on after step {done}")
    save_state(here / "loaded", engine, done, IDENTITY, save_total_limit=9)
    _fit(engine, sharded.plan_of(case), save_at(engine, here / "resumed", STEPS), done)
    _write_weights(model, names, here / "resumed.safetensors")
    engine.destroy()


def run_long(folder: Path, name: str, world_size: int, start: Path | None = None) -> None:
    """Ten steps of the same eight items each, on any number of ranks; from the checkpoint in `start`, if given."""
    from cofitune.data.batches import plan_steps
    from cofitune.training.state import load_state, save_state
    from cofitune.training.state_check import find_newest

    case = Case("long", "update", modules=ALL)
    accumulation = 4 // world_size
    settings = replace(sharded.settings_of(case), accumulation=accumulation, num_steps=LONG_STEPS)
    model, names, engine = sharded.start_case(case, folder, settings)
    done = load_state(engine, find_newest(start, print)) if start else 0
    _check(done == (LONG_SAVED if start else 0), f"{name}: went on after step {done}")

    def on_step(record: Any, _: int) -> None:
        if record.step == LONG_SAVED:
            save_state(folder / name, engine, record.step, IDENTITY, save_total_limit=1, in_pieces=True)

    plan = plan_steps(13, sharded.MICRO, accumulation, world_size, 1, LONG_STEPS)
    _fit(engine, plan, on_step, done)
    _write_weights(model, names, folder / f"{name}.safetensors")
    engine.destroy()


def run_broken(folder: Path) -> None:
    """Rank 1 cannot write its pieces; then it sees another disk than rank 0."""
    from cofitune.errors import UserError
    from cofitune.training.state import save_state

    case, rank = Case("broken"), torch.distributed.get_rank()
    _, _, engine = _start(case, folder, sharded.settings_of(case))
    _fit(engine, sharded.plan_of(case), lambda *_: None)
    try:
        with at_most_bytes(1000) if rank == 1 else nullcontext():
            save_state(folder / case.name / "full", engine, STEPS, IDENTITY, 9, in_pieces=True)
    except UserError as error:
        _check(f"the checkpoint of step {STEPS} cannot be written: File too large" in str(error), str(error))
    else:
        raise RuntimeError("nobody has said that rank 1 could not write")
    save_state(folder / case.name / f"disk-{rank}", engine, STEPS, IDENTITY, 9, in_pieces=True)
    engine.destroy()


def run_checks(folder: Path) -> None:
    """Each rank checks its share of a checkpoint; a part of either rank is damaged; each rank has a disk of its own."""
    from cofitune.training import state_files as files
    from cofitune.training.state import load_state, save_state
    from cofitune.training.state_check import find_newest

    case, rank, here = Case("checks"), torch.distributed.get_rank(), folder / "checks"
    _, _, engine = _start(case, folder, sharded.settings_of(case))
    _fit(engine, sharded.plan_of(case), lambda *_: None)
    save_state(here / "both", engine, STEPS, IDENTITY, 9, in_pieces=True)
    hashed: list[str] = []
    real = files.sha256_file

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    files.sha256_file = counting
    found = find_newest(here / "both", print)
    _check(found is not None and found.shared, "they see one folder")
    (here / f"hashed-{rank}.json").write_text(json.dumps(hashed))
    for damaged in ("rank-00000-00001", "rank-00001-00001", "random", "manifest"):
        messages: list[str] = []
        place = here / f"damaged-{damaged}"
        if rank == 0:
            _copy(here / "both", place, STEPS, STEPS - 1)
            path = next((place / f"step-{STEPS:06d}").glob(f"{damaged}.*"))
            content = bytearray(path.read_bytes())
            content[-9] ^= 1
            path.write_bytes(content)
        torch.distributed.barrier()
        found = find_newest(place, messages.append)
        _check(found is not None and found.folder == place / f"step-{STEPS - 1:06d}", f"{damaged}: {found}")
        _check(len(messages) == (rank == 0) and all(damaged in text for text in messages), f"{damaged}: {messages}")
    own = here / f"disk-{rank}"
    _copy(here / "both", own, STEPS)  # with the times of the files' contents
    hashed.clear()
    found = find_newest(own, print)
    _check(found is not None and not found.shared and bool(hashed) == (rank == 0), f"rank {rank} checks a copy")
    _check(load_state(engine, found) == STEPS, "from a disk of its own")
    save_state(here / "from_own", engine, STEPS, IDENTITY, 9, in_pieces=True)
    found = find_newest(here / ("both" if rank == 0 else "none"), print)
    _check(found is not None and not found.shared and load_state(engine, found) == STEPS, "rank 1 sees no folder")
    files.sha256_file = real
    engine.destroy()


def _copy(checkpoints: Path, into: Path, *steps: int) -> None:
    for step in steps:
        shutil.copytree(checkpoints / f"step-{STEPS:06d}", into / f"step-{step:06d}")


def _start(case: Any, folder: Path, settings: Any) -> Any:
    model, names, engine = sharded.start_case(case, folder, settings)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    torch.manual_seed(sharded.SEED + torch.distributed.get_rank())
    return model, names, engine


def _fit(engine: Any, plan: Any, on_step: Any, done: int = 0) -> None:
    from cofitune.training.loop import FitSettings, fit

    settings = FitSettings(plan, sharded.SEED, 0, start_step=done)
    _check(fit(engine, sharded.tiny_examples(), settings, on_step) == 0, "stopped unasked")


def _only(folder: Path, step: int, into: Path) -> Path:
    """A folder in which one checkpoint is the newest."""
    if torch.distributed.get_rank() == 0:
        into.mkdir()
        (into / f"step-{step:06d}").symlink_to(folder / f"step-{step:06d}")
    torch.distributed.barrier()
    return into


def _write_weights(model: Any, names: list[str], path: Path) -> None:
    from cofitune.files import write_tensors
    from cofitune.training.delta import collect

    tensors = collect(model, names)
    if torch.distributed.get_rank() == 0:
        write_tensors(path, tensors)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def main() -> None:
    """On two ranks: all cases, ten steps, and going on with what one rank has saved."""
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    start_distributed()
    freeze_imports()
    folder = Path(sys.argv[1])
    for case in CASES:
        run_case(case, folder)
        torch.distributed.barrier()
    run_broken(folder)
    run_checks(folder)
    run_long(folder, "two", 2)
    run_long(folder, "one_to_two", 2, folder / "one")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
