"""The config of one trial: the search's own with a region, no mask, few steps, and what the trial is measured on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from cofitune.config import schema
from cofitune.config.schema import Config
from cofitune.model.layouts import MODULES
from cofitune.model.region import Region
from cofitune.recipes.train.rehearsal import rehearsal_folder

if TYPE_CHECKING:
    from cofitune.recipes.search.plan import SearchPlan


def trial_config(plan: SearchPlan, region: Region | None, folder: Path, seed: int | None = None) -> Config:
    """A trial's config, complete.

    Args:
        region: what is trained; None for the base, which trains nothing.
        folder: the trial's own.
        seed: of its training; None: that of `train.seed`.
    """
    config, measure = plan.config, plan.measure
    by_loss = measure.kind == "loss"
    update: dict[str, object] = {
        "max_steps": config.search.train_steps,
        "learning_rate": base_rate(plan) if region is None else trial_rate(plan, region),
        "save_steps": None,
        "report_to": (),
        "max_drift": None,
        "drift_data": config.train.drift_data if by_loss else None,
        "seed": config.train.seed if seed is None else seed,
    }
    if config.train.rehearsal:  # a trial's folder has none of its own
        place = {"path": str(rehearsal_folder(config.train, config.run))}
        update["rehearsal"] = config.train.rehearsal.model_copy(update=place)
    # scores judge a trial by its evaluation; losses are taken by the search's own measurements
    validation = config.data.validation if by_loss and measure.validation else ()
    # the base trains nothing, but a config that came with `region: search` must not look for a winner there
    chosen = region or Region.span(0, 0, MODULES)
    changes: dict[str, object] = {
        "softmask": schema.SoftMask(apply_to="none"),
        "adapter": None,
        "train": config.train.model_copy(update=update),
        "data": config.data.model_copy(update={"validation": validation}),
        "search": config.search.model_copy(update={"measure": measure.kind}),
        "eval": measure.tasks,
        "output_dir": str(folder),
        "region": schema.Region(layers=chosen.layers_text, modules=chosen.modules),
    }
    return config.model_copy(update=changes)


def trial_rate(plan: SearchPlan, region: Region) -> float:
    """Peak learning rate of a region's trial.

    With `search.rate_scaling: sqrt` it is the rate × √(weights of the search's largest region / its own). Under AdamW
    every weight moves by about the rate, so n weights move by rate × √n in all (their Euclidean distance from the
    base): scaled so, trials of all sizes go equally far. Ours; a smaller region usually wants the higher rate.
    """
    rate = base_rate(plan)
    if plan.config.search.rate_scaling == "none":
        return rate
    return float(f"{rate * math.sqrt(plan.most_weights / region.num_parameters(plan.anatomy)):.4g}")


def base_rate(plan: SearchPlan) -> float:
    """The rate of the largest region's trial."""
    return plan.config.search.learning_rate or plan.config.train.learning_rate
