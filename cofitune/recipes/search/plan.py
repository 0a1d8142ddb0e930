"""What a search knows before its first trial: levels, what trials are measured by, and what their figures depend on.

Every mistake of the user is found here.
"""

from __future__ import annotations

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
from cofitune.model.region import Region
from cofitune.recipes.computed_with import COMPUTED_WITH
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.folders import check_folder
from cofitune.recipes.from_config import base_anatomy, base_config, eval_tasks, tasks_by_category
from cofitune.recipes.search.batches import with_batch_size
from cofitune.recipes.search.identity import search_identity
from cofitune.recipes.search.levels import search_levels
from cofitune.recipes.search.measure import Measure, choose_measure
from cofitune.recipes.search.trial_config import trial_config
from cofitune.recipes.train.plan import TrainPlan, plan_train
from cofitune.recipes.trial.loss_items import LossItems, read_loss_items
from cofitune.recipes.trial.prefix_cache import check_prefix, layer_bytes
from cofitune.search.halving import SuccessiveHalving
from cofitune.search.space import Level, PlannedLevel, check_levels, plan, whole_model
from cofitune.search.store import open_store, with_stored


@dataclass(frozen=True)
class SearchPlan:
    """A search, resolved.

    Attributes:
        config: what it was resolved from.
        folder: `<output_dir>/search`.
        measure: what trials are compared by, with their tasks.
        identity: what a trial's figures depend on besides its region, as JSON values.
        most_weights: trained weights of the largest region of the search.
        prefix_bytes: what search.prefix_cache keeps of one layer, on all ranks together.
        notes: what is to be said before the first trial.
        missing: what a dry run could not find but the search will need.
    """

    config: Config
    folder: Path
    anatomy: Anatomy
    levels: tuple[Level, ...]
    planned: tuple[PlannedLevel, ...]
    measure: Measure
    most_weights: int = 0
    prefix_bytes: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
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
    def rungs(self) -> SuccessiveHalving | None:
        """Where weak trials stop early; None: nowhere."""
        search = self.config.search
        halving = search.halving
        return SuccessiveHalving(halving.steps, halving.keep, search.early_stop) if halving else None

    @property
    def at_most(self) -> int:
        """Trials, the base and further seeds not counted, if none fails."""
        return sum(level.most for level in self.planned)

    @property
    def most_repeats(self) -> int:
        """Trials with a further seed that follow at most."""
        search = self.config.search
        return (search.most_seeds - 1) * min(search.repeat_regions, self.at_most)


def plan_search(config: Config, overwrite: bool = False, dry_run: bool = False, ranks: int = 1) -> SearchPlan:
    """Check everything that the user could have got wrong, and hash what the figures depend on.

    A dry run also plans a model of which only config.json is at hand; `missing` then says what a run will need.

    Raises:
        UserError: the model, a level, the data, a task or the output folder cannot be used; or the folder's trials were
            made with other contents of these files.
    """
    folder = check_folder(config, "search", overwrite)
    anatomy = base_anatomy(config.model, base_config(config.model, config.data.max_length))
    anatomy.check_units("search")
    levels = search_levels(config.search, anatomy.modules)
    check_levels(levels, anatomy.num_layers, anatomy.modules)
    kept = config.search.proxy_keep if config.search.proxy == "prune" else 1.0
    planned = plan(levels, anatomy.num_layers, config.search.beam, anatomy.modules, kept)
    measure = choose_measure(config)
    loaded = _load_tasks(measure)
    _check_proxy(config.search.proxy, config.importance)
    check_prefix(config.search.prefix_cache, config.model)
    made = SearchPlan(config, folder, anatomy, levels, tuple(planned), measure)
    made = replace(made, most_weights=made.largest.num_parameters(anatomy))
    trial = trial_config(made, made.largest, folder)
    training = plan_train(trial, ranks, dry_run)
    asked = plan_eval(trial) if measure.kind == "score" and not dry_run else None
    measure = with_batch_size(measure, training, asked, folder if made.has_store and not overwrite else None)
    made = replace(made, measure=measure)
    by_loss = measure.kind == "loss" and training.data.tokenizer is not None
    max_length = config.data.max_length
    items = read_loss_items(measure.tasks, max_length, training.data, measure.limit) if by_loss else None
    made = replace(
        made,
        identity=search_identity(made, loaded, training, ranks),
        prefix_bytes=_prefix_bytes(config.search.prefix_cache, training, items),
        notes=_notes(made, items, loaded),
        missing=training.missing,
    )
    if made.has_store and not overwrite and training.base_fingerprint:
        if dry_run:  # to look from a machine without GPUs is allowed: nothing is compared with what they computed
            made = replace(made, identity=with_stored(folder, made.identity, COMPUTED_WITH))
        open_store(folder, made.identity)
    return made


def _prefix_bytes(kind: str, training: TrainPlan, items: LossItems | None) -> int:
    """What `search.prefix_cache` keeps of one layer; 0 where it keeps nothing, or a dry run has no tokenizer."""
    return layer_bytes(training, items) if kind != "none" and len(training.data.lengths) else 0


def _check_proxy(proxy: str, importance: schema.Importance) -> None:
    if proxy != "none" and not importance.data:
        raise ConfigError(
            [
                f"search.proxy: {proxy} needs general data to see what a region would harm: name it in "
                "importance.data, for example importance: {data: [data/general.jsonl]}"
            ]
        )


def _load_tasks(measure: Measure) -> tuple[LoadedTask, ...]:
    groups = tasks_by_category(measure.tasks)
    problems = []
    if measure.kind == "score":
        if not groups["speciality"]:
            problems.append(f"{measure.section}.speciality: names no task; a search scores each region on speciality")
        if not any(group for name, group in groups.items() if name not in ("speciality", "drift")):
            problems.append(
                f"{measure.section}.versatility: names no task; a search scores each region on versatility, too"
            )
    if problems:
        raise ConfigError(problems)
    return load_tasks(eval_tasks(measure.tasks))


def _notes(made: SearchPlan, items: LossItems | None, loaded: Sequence[LoadedTask]) -> tuple[str, ...]:
    """What is to be said of the items that trials are measured on.

    Raises:
        ConfigError: no development item fits.
    """
    measure, notes = made.measure, list(made.measure.notes)
    if made.config.search.eval is None and not measure.validation:
        notes.append(
            "search.eval is not given: regions are chosen on eval's own items, which flatters a later `eval` on them"
        )
    notes += [one.about_unread for one in loaded if one.unread]
    if items:
        if not items.development:
            raise ConfigError(
                [
                    f"search.measure: loss: not one development item fits into data.max_length "
                    f"({made.config.data.max_length} tokens)"
                ]
            )
        if items.left_out:
            notes.append(f"{items.left_out} items do not fit into data.max_length, and no loss is taken on them")
    return tuple(notes)
