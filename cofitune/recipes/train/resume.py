"""Going on with a training: whose checkpoint it is, when one is written, and what is kept of the metrics."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from cofitune.config.schema import FREE_SETTINGS, Config
from cofitune.data.encoded import tokenizer_sha256
from cofitune.errors import ArtifactError, UserError, differences
from cofitune.files import write_text
from cofitune.recipes.train.plan import TrainPlan
from cofitune.training.drift import DriftRecord
from cofitune.training.loop import StepRecord
from cofitune.training.state import (
    Checkpoint,
    checkpoint_folders,
    newest_whole,
    read_checkpoint,
    save_state,
)
from cofitune.training.validation import ValidationRecord

# they say how a step's items are shared out and what is computed anew, not what the step computes
SHARING = {"per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "prefix_cache"}


class Saver:
    """Writes a checkpoint every `save_steps`, at an epoch's end, and when the ranks stop."""

    def __init__(self, config: Config, plan: TrainPlan, folder: Path, engine: Any, done: int) -> None:
        self._train, self._num_steps, self._engine = config.train, plan.steps.num_steps, engine
        self._folder, self._identity = folder, identity(config, plan)
        self._last = done  # the step of the newest checkpoint; 0 without one

    def after_step(self, record: StepRecord, stopped_by: int) -> None:
        """Save where it is due. Every rank must call.

        The last step needs none: the delta is written at once.
        """
        if self.is_due(record, stopped_by):
            save_state(self._folder / "checkpoints", self._engine, record.step, self._identity, self._train.keep_last)
            self._last = record.step

    def is_due(self, record: StepRecord, stopped_by: int) -> bool:
        """Whether a step is to be saved."""
        every = self._train.save_steps
        if every is None or record.step == self._num_steps:
            return False
        return record.step % every == 0 or record.epoch.is_integer() or bool(stopped_by)

    def whereabouts(self) -> str:
        """What a message about a training that ended early says of the way back."""
        if not self._last:
            return "no checkpoint was written before"
        return f"the state after step {self._last} is in {self._folder / 'checkpoints'}; --resume goes on from it"


def identity(config: Config, plan: TrainPlan) -> dict[str, Any]:
    """What a training must not change on its way, by contents and not by path, as JSON values.

    Neither the ranks, nor the ZeRO stage, nor the settings of saving are part of it, as long as an optimizer step takes
    the same items.
    """
    # an item that `on_bad_item: error` stops at never gets here: with the same contents it changes nothing
    data = config.data.model_dump(mode="json", exclude={"train", "replay", "on_bad_item", *FREE_SETTINGS["data"]})
    tokenizer = plan.data.tokenizer
    sources = {
        str(i): {"format": s.source.format, "weight": s.source.weight, "sha256": s.sha256}
        for i, s in enumerate(plan.data.sources)
    }
    softmask: dict[str, Any] = {"apply_to": config.softmask.apply_to if plan.masked else "none"}
    if plan.masked:
        softmask |= {
            "modules": list(plan.masked),
            "strength": config.softmask.strength,
            **({"control": config.softmask.control} if config.softmask.control != "none" else {}),
            "importance_sha256": sorted(
                used["sha256"] for name, used in plan.used.items() if name.startswith("importance")
            ),
        }
    return {
        "model": {
            "base_fingerprint": plan.base_fingerprint,
            "dtype": str(plan.settings.dtype).removeprefix("torch."),
            "attn_implementation": config.model.attn_implementation,
            "layout": asdict(plan.anatomy.layout),
            "tokenizer_sha256": tokenizer_sha256(tokenizer) if tokenizer else None,
        },
        "region": {**plan.region.to_dict(), "matched": list(plan.region.matched)},
        "adapter": {**plan.adapter.as_dict(), "begins": plan.adapter_begins} if plan.adapter else None,
        "softmask": softmask,
        "data": {**data, "template": plan.data.template, "train": sources},
        "train": {
            **config.train.model_dump(mode="json", exclude={"rehearsal", *SHARING, *FREE_SETTINGS["train"]}),
            "items_a_step": plan.steps.per_step,
        },
        "rehearsal": plan.rehearsal.trained_on() if plan.rehearsal and plan.rehearsal.loss else None,
    }


def newest_readable(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a run's `train` folder by its manifest alone; its tensors are not looked at."""
    for path in checkpoint_folders(folder / "checkpoints"):
        try:
            return read_checkpoint(path)
        except ArtifactError:
            continue  # said aloud when it comes to loading
    return None


def check_resume(config: Config, plan: TrainPlan, found: Checkpoint) -> None:
    """Compare this call with a checkpoint.

    Raises:
        UserError: it is another training's; the message names each entry that differs, and both values.
    """
    before, now = found.identity, identity(config, plan)
    items, train, world_size = before["train"]["items_a_step"], config.train, plan.steps.world_size
    if items != plan.steps.per_step:
        on_all = train.per_device_train_batch_size * world_size
        told = (
            f"train.gradient_accumulation_steps={items // on_all} gives the same"
            if items % on_all == 0
            else f"choose a train.per_device_train_batch_size of which {world_size} together divide {items}"
        )
        raise UserError(
            f"{found.folder}: an optimizer step took {items} items there and would take {plan.steps.per_step} here ("
            f"{train.per_device_train_batch_size} × {train.gradient_accumulation_steps} accumulated × {world_size} "
            f"rank{'s' if world_size > 1 else ''}); {told}"
        )
    if plan.adapter and plan.adapter_begins is None:  # known once it is in the model, when this is called once more
        now["adapter"]["begins"] = (before.get("adapter") or {}).get("begins")
    changed = differences("", before, now)
    if changed:
        raise ArtifactError(
            f"{found.folder} is another training's checkpoint ({'; '.join(changed)}); --overwrite starts again, or "
            "choose another output_dir"
        )


def find_checkpoint(config: Config, plan: TrainPlan, folder: Path, console: Console) -> Checkpoint | None:
    """The newest whole checkpoint, to go on from; says which it is, and which are damaged.

    Raises:
        UserError: it is another training's.
    """

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    found = newest_whole(folder / "checkpoints", tell)
    if found is None:
        tell(f"resume: {folder} holds no whole checkpoint, so from the beginning")
        return None
    check_resume(config, plan, found)
    tell(f"resume: going on after step {found.step} ({found.folder})")
    return found


def keep_metrics(path: Path, step: int) -> tuple[list[StepRecord], list[ValidationRecord], list[DriftRecord]]:
    """Cut metrics.jsonl after `step`, so that every step occurs once, and return what stays.

    Raises:
        ArtifactError: it lacks steps up to `step`.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if step and lines and not _is_record(lines[-1]):
        lines.pop()  # torn: its process was killed
    kept = [entry for line in lines if (entry := json.loads(line))["step"] <= step] if step else []
    records = [StepRecord(**entry) for entry in kept if "loss" in entry]
    if [r.step for r in records] != list(range(1, step + 1)):
        raise ArtifactError(f"{path} does not hold the steps 1 to {step}, after which the checkpoint was written")
    if records:
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    else:
        path.unlink(missing_ok=True)
    validations = [ValidationRecord(**entry) for entry in kept if "validation_loss" in entry]
    return records, validations, [DriftRecord(**entry) for entry in kept if "drift" in entry]


def append_metrics(path: Path, record: StepRecord | ValidationRecord | DriftRecord) -> None:
    """Add a line; it is on the disk before the checkpoint that relies on it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.as_dict()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def bytes_to_come(config: Config, plan: TrainPlan, folder: Path) -> int:
    """Bytes that a training will take in its folder at most, besides the checkpoints that are there already.

    Of checkpoints there is one more than are kept, while it is written.
    """
    there = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*.safetensors"))
    checkpoints = (config.train.keep_last + 1) * plan.checkpoint_bytes if config.train.save_steps else 0
    prefix = plan.prefix.num_bytes if plan.prefix and config.train.prefix_cache == "disk" else 0
    return max(0, checkpoints - there) + plan.delta_bytes + prefix


def _is_record(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
