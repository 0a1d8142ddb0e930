"""What a search knows before its first trial: levels, tasks, the config of each trial, and what the scores depend on.

Every mistake of the user is found here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cofitune.config import schema
from cofitune.config.schema import Config
from cofitune.errors import ConfigError
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.anatomy import Anatomy
from cofitune.model.layouts import MODULES
from cofitune.model.load import choose_dtype
from cofitune.model.region import Region
from cofitune.recipes.evaluate.plan import make_plan as plan_evaluation
from cofitune.recipes.folders import check_folder
from cofitune.recipes.from_config import base_anatomy, base_config, eval_tasks, tasks_by_category
from cofitune.recipes.train.plan import TrainPlan, plan_train
from cofitune.recipes.train.rehearsal import rehearsal_folder
from cofitune.recipes.trial.prefix_cache import check_prefix, layer_bytes
from cofitune.search.space import Level, PlannedLevel, check_levels, paper_levels, plan, whole_model
from cofitune.search.store import open_store


@dataclass(frozen=True)
class Plan:
    """All that is known before the first trial.

    Attributes:
        identity: what the scores of a trial depend on besides its region, as JSON values.
        tasks: the evaluation of each trial, limits applied.
        most_weights: trained weights of the largest region of the search.
        prefix_bytes: what search.prefix_cache keeps of one layer, on all ranks together.
        missing: what a dry run could not find but the search will need.
    """

    folder: Path
    anatomy: Anatomy
    levels: tuple[Level, ...]
    planned: tuple[PlannedLevel, ...]
    tasks: schema.Eval
    most_weights: int
    prefix_bytes: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def has_store(self) -> bool:
        """Whether an earlier call has begun this search."""
        return (self.folder / "store.json").exists()

    @property
    def root(self) -> Region:
        """All layers × all modules."""
        return whole_model(self.anatomy.num_layers, self.anatomy.modules)

    @property
    def largest(self) -> Region:
        """The region with the most weights, whose trial takes longest."""
        regions = (region for level in self.planned for region in level.candidates)
        return max(regions, key=lambda region: region.num_parameters(self.anatomy))

    @property
    def lowest_layers(self) -> tuple[int, ...]:
        """The lowest trained layers of the regions, layer 0 excepted: what enters them can be kept."""
        regions = (region for level in self.planned for region in level.candidates)
        return tuple(sorted({region.first for region in regions} - {0}))

    @property
    def at_most(self) -> int:
        """Trials, the base not counted, if none fails."""
        return sum(level.most for level in self.planned)


def make_plan(config: Config, overwrite: bool = False, dry_run: bool = False, ranks: int = 1) -> Plan:
    """Check everything that the user could have got wrong, and hash what the scores depend on.

    A dry run also plans a model of which only config.json is at hand; `missing` then says what a run will need.

    Raises:
        UserError: the model, a level, the data, a task or the output folder cannot be used; or the folder's trials were
            made with other contents of these files.
    """
    folder = check_folder(config, "search", overwrite)
    anatomy = base_anatomy(config.model, base_config(config.model))
    levels = _levels(config, anatomy.modules)
    check_levels(levels, anatomy.num_layers, anatomy.modules)
    kept = config.search.proxy_keep if config.search.proxy == "prune" else 1.0
    planned = plan(levels, anatomy.num_layers, config.search.beam, anatomy.modules, kept)
    tasks = _trial_tasks(config)
    loaded = _load_tasks(tasks, "eval" if config.search.eval is None else "search.eval")
    _check_proxy(config)
    check_prefix(config)
    made = Plan(folder, anatomy, levels, tuple(planned), tasks, most_weights=0)
    made = replace(made, most_weights=made.largest.num_parameters(anatomy))
    trial = trial_config(config, made.largest, made, folder)
    training = plan_train(trial, ranks, dry_run)
    if not dry_run:
        plan_evaluation(trial)
    identity = _identity(config, made, loaded, training, ranks)
    keeps = config.search.prefix_cache != "none" and len(training.data.lengths) > 0
    prefix_bytes = layer_bytes(training, config.train.seed) if keeps else 0
    made = replace(made, prefix_bytes=prefix_bytes, identity=identity, missing=training.missing)
    if made.has_store and not overwrite and training.base_fingerprint:
        open_store(folder, identity)
    return made


def trial_config(config: Config, region: Region | None, plan: Plan, folder: Path) -> Config:
    """The config of one trial: the base config with this region, no mask, few steps, and the trials' own evaluation."""
    rate = base_rate(config) if region is None else trial_rate(config, region, plan)
    update: dict[str, Any] = {
        "max_steps": config.search.train_steps, "learning_rate": rate, "save_steps": None, "report_to": (),
        "max_drift": None, "drift_data": None,
    }  # fmt: skip
    if config.train.rehearsal:  # a trial's folder has none of its own
        place = {"path": str(rehearsal_folder(config.train, config.run))}
        update["rehearsal"] = config.train.rehearsal.model_copy(update=place)
    changes: dict[str, Any] = {
        "softmask": schema.SoftMask(apply_to="none"),
        "adapter": None,
        "train": config.train.model_copy(update=update),
        "data": config.data.model_copy(update={"validation": ()}),  # a trial is judged by its evaluation
        "eval": plan.tasks,
        "output_dir": str(folder),
    }
    # the base trains nothing, but a config that came with `region: search` must not look for a winner there
    chosen = region or Region.span(0, 0, MODULES)
    changes["region"] = schema.Region(layers=chosen.layers_text, modules=chosen.modules)
    return config.model_copy(update=changes)


def trial_rate(config: Config, region: Region, plan: Plan) -> float:
    """Peak learning rate of a region's trial.

    With `search.rate_scaling: sqrt` it is the rate × √(weights of the search's largest region / its own). Under AdamW
    every weight moves by about the rate, so n weights move by rate × √n in all (their Euclidean distance from the
    base): scaled so, trials of all sizes go equally far. Ours; a smaller region usually wants the higher rate.
    """
    rate = base_rate(config)
    if config.search.rate_scaling == "none":
        return rate
    return float(f"{rate * math.sqrt(plan.most_weights / region.num_parameters(plan.anatomy)):.4g}")


def base_rate(config: Config) -> float:
    """The rate of the largest region's trial."""
    return config.search.learning_rate or config.train.learning_rate


def _check_proxy(config: Config) -> None:
    if config.search.proxy != "none" and not config.importance.data:
        raise ConfigError(
            [
                f"search.proxy: {config.search.proxy} needs general data to see what a region would harm: name it in "
                "importance.data, for example importance: {data: [data/general.jsonl]}"
            ]
        )


def _levels(config: Config, modules: tuple[str, ...]) -> tuple[Level, ...]:
    if config.search.levels == "paper":
        return paper_levels(modules)
    return tuple(Level(level.layers or (), level.modules or ()) for level in config.search.levels)


def _trial_tasks(config: Config) -> schema.Eval:
    """The tasks of `search.eval`, or of `eval`, with at most `search.limit` items each; no model beside the run."""
    given, most = config.search.eval or config.eval, config.search.limit

    def limited(tasks: tuple[schema.Task, ...]) -> tuple[schema.Task, ...]:
        if most is None:
            return tasks
        return tuple(task.model_copy(update={"limit": min(given.limit or task.limit or most, most)}) for task in tasks)

    parts = {name: limited(getattr(given.versatility, name)) for name in schema.Versatility.model_fields}
    versatility = given.versatility.model_copy(update=parts)
    update: dict[str, Any] = {"speciality": limited(given.speciality), "versatility": versatility}
    update["models"] = ()  # those beside the run are none of the search's
    if most is not None:
        update["limit"] = None  # each task has its own now
    return given.model_copy(update=update)


def _load_tasks(tasks: schema.Eval, section: str) -> tuple[LoadedTask, ...]:
    groups = tasks_by_category(tasks)
    problems = []
    if not groups["speciality"]:
        problems.append(f"{section}.speciality: names no task; a search scores each region on speciality")
    if not any(group for name, group in groups.items() if name not in ("speciality", "drift")):
        problems.append(f"{section}.versatility: names no task; a search scores each region on versatility, too")
    if problems:
        raise ConfigError(problems)
    return load_tasks(eval_tasks(tasks))


def _identity(
    config: Config, plan: Plan, loaded: Sequence[LoadedTask], training: TrainPlan, ranks: int
) -> dict[str, Any]:
    """What a trial's scores depend on besides its region, by contents and not by path."""
    without_effect = {"max_steps", "num_train_epochs", "max_drift", "rehearsal", *schema.FREE_SETTINGS["train"]}
    train = config.train.model_dump(mode="json", exclude=without_effect) | {"learning_rate": base_rate(config)}
    if config.search.rate_scaling != "none":
        train |= {"rate_scaling": config.search.rate_scaling, "rate_is_of_weights": plan.most_weights}
    data = config.data.model_dump(mode="json", exclude={"train", *schema.FREE_SETTINGS["data"]})
    data_from = [
        {"format": o.source.format, "weight": o.source.weight, "sha256": o.sha256} for o in training.data.sources
    ]
    return {
        "model": {
            "fingerprint": training.base_fingerprint,
            "dtype": _dtype(config),
            "attn_implementation": config.model.attn_implementation,
        },
        "data": {**data, "train": data_from},
        "train": {**train, "steps": config.search.train_steps, "ranks": ranks},  # ranks: the batch grows with them
        **({"rehearsal": training.rehearsal.as_dict()} if training.rehearsal else {}),
        "eval": {
            "speciality_weight": plan.tasks.speciality_weight,
            "batch_size": plan.tasks.batch_size,
            "tasks": {one.task.title: _task_identity(one) for one in loaded},
        },
    }


def _dtype(config: Config) -> str:
    """The precision of the trials: what `auto` comes to here; a cluster's nodes may differ from this machine."""
    if config.model.dtype == "auto" and config.search.executor == "ray":
        return "auto, on the cluster"
    return str(choose_dtype(config.model.dtype)).removeprefix("torch.")


def _task_identity(loaded: LoadedTask) -> dict[str, Any]:
    settings = {name: value for name, value in vars(loaded.task).items() if name not in ("path", "on_bad_item")}
    return {**settings, "sha256": loaded.sha256, "unusable": loaded.unusable}
