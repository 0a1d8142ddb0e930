"""What the figures of a search's trials depend on besides their region, by contents and not by path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cofitune.config import schema
from cofitune.data.template import NAMED, template_sha256
from cofitune.evaluation.items import LoadedTask
from cofitune.model.load import choose_dtype, dtype_name
from cofitune.recipes.computed_with import COMPUTED_WITH, computed_with
from cofitune.recipes.from_config import comparable_data, kernels_recorded
from cofitune.recipes.search.trial_config import base_rate
from cofitune.recipes.train.plan import TrainPlan

if TYPE_CHECKING:
    from cofitune.recipes.search.plan import SearchPlan


def search_identity(
    plan: SearchPlan, loaded: Sequence[LoadedTask], training: TrainPlan, ranks: int
) -> dict[str, object]:
    """All of it, as JSON values.

    Args:
        loaded: the tasks of a trial.
        training: a trial's, resolved.
        ranks: on how many it trains: the batch grows with them.
    """
    config = plan.config
    without_effect = {"max_steps", "num_train_epochs", "max_drift", "rehearsal", *schema.FREE_SETTINGS["train"]}
    train = config.train.model_dump(mode="json", exclude=without_effect) | {"learning_rate": base_rate(plan)}
    if config.search.rate_scaling != "none":
        train |= {"rate_scaling": config.search.rate_scaling, "rate_is_of_weights": plan.most_weights}
    data = comparable_data(config.data, exclude=("train",))
    if config.data.template not in NAMED and training.data.tokenizer:
        data["template_sha256"] = template_sha256(training.data.tokenizer)
    data_from = [
        {"format": one.source.format, "weight": one.source.weight, "sha256": one.sha256}
        for one in training.data.sources
    ]
    by_loss = plan.measure.kind == "loss"
    return {
        "model": {
            "fingerprint": training.base_fingerprint,
            "dtype": _dtype(config.model.dtype, config.search.executor),
            "attn_implementation": config.model.attn_implementation,
            **kernels_recorded(config.model, plan.anatomy.model_type),
        },
        "data": {**data, "train": data_from},
        "train": {**train, "steps": config.search.train_steps, "ranks": ranks},
        **({"rehearsal": training.rehearsal.as_dict()} if training.rehearsal else {}),
        **({"losses": _losses(plan, training)} if by_loss else {}),
        "eval": {
            **({} if by_loss else {"speciality_weight": plan.measure.tasks.speciality_weight}),
            "batch_size": plan.measure.tasks.batch_size,
            "tasks": {one.task.title: _task(one, by_loss) for one in loaded},
        },
        # a cluster's nodes may differ from this machine, and say so themselves
        COMPUTED_WITH: computed_with("on the cluster" if config.search.executor == "ray" else None),
    }


def _losses(plan: SearchPlan, training: TrainPlan) -> dict[str, object]:
    """What is measured without tasks, and when."""
    held_out = training.rehearsal.held_out if training.rehearsal else None
    answers = hashlib.sha256(json.dumps([e.input_ids for e in held_out.examples] if held_out else []).encode())
    return {
        # those of halving come on top, and only make a curve finer
        "measured_steps": list(plan.config.search.halved_steps),
        "held_out_sha256": answers.hexdigest(),
        "validation": [[one.source.format, one.sha256] for one in training.data.validation_sources],
        **({"validation_items": plan.measure.limit} if plan.measure.validation else {}),
    }


def _dtype(dtype: str, executor: str) -> str:
    """The precision of the trials: what `auto` comes to here; a cluster's nodes may differ from this machine."""
    if dtype == "auto" and executor == "ray":
        return "auto, on the cluster"
    return dtype_name(choose_dtype(dtype))


def _task(loaded: LoadedTask, by_loss: bool) -> dict[str, object]:
    """A task; losses do not depend on how an answer would be generated or graded."""
    left_out = {"path", "on_bad_item"}
    left_out |= {"metric", "pattern", "max_new_tokens", "stop", "tokenize"} if by_loss else set()
    settings = {name: value for name, value in vars(loaded.task).items() if name not in left_out}
    return {**settings, "sha256": loaded.sha256, "unusable": loaded.unusable}
