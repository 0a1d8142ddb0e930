"""Going on with a training: whose checkpoint it is, when one is written, and what is kept of the metrics."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cofitune.config.schema import FREE_SETTINGS
from cofitune.data.encoded import tokenizer_sha256
from cofitune.distributed import run_on_rank_zero
from cofitune.errors import ArtifactError, UserError, differences
from cofitune.files import read_json
from cofitune.model.load import dtype_name
from cofitune.recipes.computed_with import COMPUTED_WITH, changed_since, computed_with
from cofitune.recipes.folders import versions_of_packages
from cofitune.recipes.from_config import comparable_data, kernels_recorded
from cofitune.recipes.train.plan import TrainPlan
from cofitune.reports.console import say
from cofitune.training.checkpoint_folders import checkpoint_folders
from cofitune.training.fit_device import device_bytes
from cofitune.training.optimizer import may_be_undecayed
from cofitune.training.state_check import find_newest
from cofitune.training.state_files import Checkpoint, read_checkpoint

PACKS = "attention to packs"  # among what computed the steps
# they say how a step's items are shared out and what is computed anew, not what the step computes
SHARING = {"per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "prefix_cache"}


def identity(plan: TrainPlan) -> dict[str, Any]:
    """What a training must not change on its way, by contents and not by path, as JSON values.

    Neither the ranks, nor the ZeRO stage, nor the settings of saving are part of it, as long as an optimizer step takes
    the same items. What computes is in it only to be told where it has changed: nobody should lose a training to a
    newer package.
    """
    config = plan.config
    # an item that `on_bad_item: error` stops at never gets here: with the same contents it changes nothing
    data = comparable_data(config.data, exclude=("train", "replay", "on_bad_item"))
    tokenizer = plan.data.tokenizer
    sources = {
        str(i): {"format": s.source.format, "weight": s.source.weight, "sha256": s.sha256}
        for i, s in enumerate(plan.data.sources)
    }
    softmask: dict[str, object] = {"apply_to": config.softmask.apply_to if plan.masked else "none"}
    if plan.masked:
        softmask |= {
            "modules": list(plan.masked),
            **({"axis": config.softmask.axis} if config.softmask.axis != "rows" else {}),
            "strength": config.softmask.strength,
            **({"threshold": config.softmask.threshold} if config.softmask.threshold is not None else {}),
            **({"control": config.softmask.control} if config.softmask.control != "none" else {}),
            "importance_sha256": sorted(
                used["sha256"] for name, used in plan.used.items() if name.startswith("importance")
            ),
        }
    return {
        "model": {
            "base_fingerprint": plan.base_fingerprint,
            "dtype": dtype_name(plan.settings.dtype),
            "attn_implementation": config.model.attn_implementation,
            **kernels_recorded(config.model, plan.anatomy.model_type),
            "layout": asdict(plan.anatomy.layout),
            "tokenizer_sha256": tokenizer_sha256(tokenizer) if tokenizer else None,
        },
        "region": {**plan.region.to_dict(), "matched": list(plan.region.matched)},
        "adapter": {**plan.adapter.as_dict(), "begins": plan.adapter_begins} if plan.adapter else None,
        "softmask": softmask,
        "data": {**data, "template": plan.data.template, "train": sources},
        "train": {
            **config.train.model_dump(mode="json", exclude={"rehearsal", *SHARING, *FREE_SETTINGS["train"]}),
            "decay_all": _all_decays(plan),
            "items_a_step": plan.steps.per_step,
        },
        "rehearsal": plan.rehearsal.trained_on() if plan.rehearsal and plan.rehearsal.loss else None,
        COMPUTED_WITH: _computed_with(plan),
    }


def _computed_with(plan: TrainPlan) -> dict[str, str]:
    return computed_with() | ({PACKS: plan.pack_attention} if plan.pack_attention else {})


def _all_decays(plan: TrainPlan) -> bool:
    """Whether no trained weight is left out of weight decay, by the config or because it has no bias or norm.

    So earlier versions trained whatever the region; where it has none of these, their checkpoints continue.
    """
    train = plan.config.train
    return train.decay_all or not train.weight_decay or not may_be_undecayed(plan.trained, plan.anatomy.shapes)


def agreed(plan: TrainPlan) -> dict[str, object]:
    """What all ranks must have found alike before they train: contents, since paths may be each machine's own."""
    train = plan.config.train.model_dump(mode="json", exclude={"rehearsal", "drift_data"})
    found = {name: value for name, value in identity(plan).items() if name != COMPUTED_WITH}  # GPUs may be mixed
    return {
        "packages": versions_of_packages(),
        "items": len(plan.examples),
        "tokens": sum(plan.lengths),
        "steps": plan.steps.num_steps,
        **found,
        "train": {**found["train"], **train},
        "deepspeed": plan.config.deepspeed.model_dump(mode="json"),
        "resolved": plan.resolved,
    }


def newest_readable(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a run's `train` folder by its manifest alone; its tensors are not looked at."""
    for path in checkpoint_folders(folder / "checkpoints"):
        try:
            return read_checkpoint(path)
        except ArtifactError:
            continue  # said aloud when it comes to loading
    return None


def keep_stage(plan: TrainPlan, reached: Checkpoint | None) -> TrainPlan:
    """Let `deepspeed.zero_stage: auto` mean the stage that a training on its way began under.

    What is free of a CPU's memory changes from call to call, and another stage may sum in another order. On another
    number of ranks, or with weights moved to the host, the stage is chosen anew: the bits are others there anyway.

    Args:
        reached: what it continues from; None: it begins.
    """
    deepspeed, ranks = plan.config.deepspeed, plan.steps.world_size
    if reached is None or reached.zero_stage is None or reached.world_size != ranks:
        return plan
    if deepspeed.zero_stage != "auto" or deepspeed.offload_param == "cpu":
        return plan
    chosen, kept = plan.settings.zero_stage, reached.zero_stage
    note = (
        f"deepspeed.zero_stage: auto would choose {chosen} for what is free of the memory now; the training continues "
        f"under {kept}, as it began (deepspeed.zero_stage={chosen} changes it)"
    )
    plan = replace(plan, kept_stage=kept, notes=plan.notes if chosen == kept else (*plan.notes, note))
    return plan.fitted(device_bytes(ranks))


def check_resume(plan: TrainPlan, result: Checkpoint) -> None:
    """Compare this call with a checkpoint.

    Raises:
        UserError: it is another training's; the message names each entry that differs, and both values.
    """
    before, now = _in_todays_words(result.identity), identity(plan)
    items, train, world_size = before["train"]["items_a_step"], plan.config.train, plan.steps.world_size
    if items != plan.steps.per_step:
        on_all = train.per_device_train_batch_size * world_size
        message = (
            f"train.gradient_accumulation_steps={items // on_all} gives the same"
            if items % on_all == 0
            else f"choose a train.per_device_train_batch_size of which {world_size} together divide {items}"
        )
        raise UserError(
            f"{result.folder}: an optimizer step took {items} items there and would take {plan.steps.per_step} here ("
            f"{train.per_device_train_batch_size} × {train.gradient_accumulation_steps} accumulated × {world_size} "
            f"rank{'s' if world_size > 1 else ''}); {message}"
        )
    if plan.adapter and plan.adapter_begins is None:  # known once it is in the model, when this is called once more
        now["adapter"]["begins"] = (before.get("adapter") or {}).get("begins")
    changed = differences("", *({k: v for k, v in one.items() if k != COMPUTED_WITH} for one in (before, now)))
    if changed:
        raise ArtifactError(
            f"{result.folder} is another training's checkpoint ({'; '.join(changed)}); --overwrite starts again, or "
            "choose another output_dir"
        )


def _in_todays_words(written: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity with old keys by their new names (config/renamed.py), and newer ones as it was then."""
    adapter = written.get("adapter")
    if adapter and "kept" in adapter:
        adapter = {key if key != "kept" else "effective_rank": value for key, value in adapter.items()}
    train = {"optimizer": "adamw", "decay_all": True, **written["train"]}
    return {**written, "adapter": adapter, "train": train}


def find_checkpoint(plan: TrainPlan, console: Console) -> Checkpoint | None:
    """The newest whole checkpoint, to continue from; says which it is, and which are damaged. Collective.

    Raises:
        UserError: it is another training's; on every rank.
    """

    def tell(text: str) -> None:
        say(console, text)

    result = find_newest(plan.folder / "checkpoints", tell)

    def agree() -> None:
        if result is None:
            tell(f"resume: {plan.folder} holds no whole checkpoint, so from the beginning")
            return
        check_resume(plan, result)
        tell(f"resume: continuing after step {result.step} ({result.folder})")
        written = result.identity.get(COMPUTED_WITH)
        before = written if isinstance(written, dict) else {}
        # earlier versions made a mask where attention now takes each conversation by itself, and did not write it down
        changed = changed_since({PACKS: "mask", **before} if plan.varlen else before, _computed_with(plan))
        if changed:
            tell(f"note: it was computed with another {changed}; the steps to come may differ in their last digits")

    run_on_rank_zero(agree)
    return result


def required_disk_bytes(plan: TrainPlan) -> int:
    """Bytes that a training will take in its folder at most, besides the checkpoints that are there already.

    Of checkpoints there is one more than are kept, while it is written.
    """
    train = plan.config.train
    there = sum(p.stat().st_size for p in (plan.folder / "checkpoints").rglob("*.safetensors"))
    checkpoints = (train.save_total_limit + 1) * plan.checkpoint_bytes if train.save_steps else 0
    prefix = plan.prefix.num_bytes if plan.prefix and train.prefix_cache == "disk" else 0
    return max(0, checkpoints - there) + plan.delta_bytes + prefix


def stands_on(plan: TrainPlan) -> dict[str, object]:
    """The contents that a training depends on besides its config, as the manifest keeps them."""
    return {
        "base_fingerprint": plan.base_fingerprint,
        "used": plan.used,
        "data": [source.identity() for source in plan.data.sources],
    }


def check_finished(plan: TrainPlan) -> None:
    """Compare what a finished training stands on with what lies there now.

    Raises:
        ArtifactError: it was trained from other contents.
    """
    before = read_json(plan.folder / "manifest.json", "training manifest")
    now = stands_on(plan)
    changed = [what for what, value in now.items() if before.get(what) != value]
    if changed and not plan.missing:
        raise ArtifactError(
            f"{plan.folder} was trained from other contents ({', '.join(changed)} changed since); --overwrite trains "
            "it again, or choose another output_dir"
        )
