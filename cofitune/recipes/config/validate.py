"""`cofitune config validate`: what can be wrong with a config, all of it at once; no weights and no item are needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from cofitune.config import schema
from cofitune.config.load import LoadedConfig
from cofitune.config.schema import Config
from cofitune.config.source import Source
from cofitune.data.chat import IGNORED, encode, set_template
from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, make_item, make_prompt
from cofitune.data.sources import open_source
from cofitune.errors import ConfigError, DataError, UserError
from cofitune.evaluation.tasks import lacking_rehearsal, load_tasks
from cofitune.model.load import load_tokenizer
from cofitune.recipes.folders import check_place
from cofitune.recipes.from_config import base_anatomy, base_config, chat_template, data_sources, eval_tasks
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.recipes.search.levels import search_levels
from cofitune.recipes.train import resolve
from cofitune.recipes.train.rehearsal import rehearsal_folder
from cofitune.recipes.train.softmask import importance_folders, masked_modules
from cofitune.reports.console import say
from cofitune.reports.text import many, region_text
from cofitune.search.space import check_levels
from cofitune.training.monitor import check_installed
from cofitune.training.optimizer import check_optimizer

SOURCES = ("data.train", "data.validation", "importance.data", "rehearsal.data", "data.replay.data")


@dataclass
class Findings:
    """What was looked at.

    Attributes:
        good: what is in order, a line each.
        missing: what a command will need and another one makes.
        wrong: what must be mended, a message each.
    """

    good: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, what: str, look: Callable[[], str]) -> None:
        """Note what a look says, or the user's mistake that it meets."""
        try:
            self.good.append(f"{what}: {look()}")
        except UserError as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            self.wrong += [text for text in problems if text not in self.wrong]


def validate(loaded: LoadedConfig, console: Console) -> Findings:
    """Check the model's config.json, the region, the data files and the tasks; say and return what was found.

    Raises:
        ConfigError: all that is wrong, together.
    """
    config, found = loaded.config, Findings()
    found.check("output_dir", lambda: _check_output(config.run))
    found.check("model", lambda: _check_model(config, found))
    found.check("train", lambda: _check_packages(config.train))
    if config.search.levels != "paper":
        found.check("search.levels", lambda: _check_levels(config.model, config.search))
    found.check("data.max_length", lambda: _check_length(config.model, config.data, found))
    data, replay = config.data, config.data.replay
    named = (data.train, data.validation, config.importance.data, config.rehearsal.data, replay.data if replay else ())
    for place, sources in zip(SOURCES, named, strict=True):
        for source in sources:
            found.check(place, partial(_check_source, place, source))
    if not config.data.train:
        found.missing.append("data.train: no training items are named, which `cofitune train` and `search` need")
    _check_tasks(config.train, config.run, config.eval, found)
    for line in found.good:
        say(console, ("ok       ", "green"), line)
    for line in found.missing:
        say(console, ("missing  ", "yellow"), line)
    if found.wrong:
        raise ConfigError(found.wrong)
    say(
        console,
        "valid; a dry run (`cofitune train CONFIG --dry-run`) also reads every item, and plans memory and steps",
    )
    return found


def _check_output(run: Path) -> str:
    check_place(run)
    return str(run)


def _check_packages(train: schema.Train) -> str:
    """What optimizer and trackers need; of a tracker's server nothing is asked."""
    check_optimizer(train.optimizer)
    check_installed(train.report_to)
    return f"{train.optimizer}{''.join(f', {name}' for name in train.report_to)}"


def _check_levels(model: schema.Model, search: schema.Search) -> str:
    anatomy = base_anatomy(model, base_config(model))
    levels = search_levels(search, anatomy.modules)
    check_levels(levels, anatomy.num_layers, anatomy.modules)
    return many(len(levels), "level")


def _check_length(model: schema.Model, data: schema.Data, found: Findings) -> str:
    """Whether the shortest item that there can be fits; a dry run looks at the others."""
    needs = Prerequisites(dry_run=True)
    base_config(model)  # whose message about a model that is not there is the better one
    try:
        tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    except UserError as error:
        needs.lack(error)
        found.missing += needs.missing
        return f"{data.max_length} tokens"
    set_template(tokenizer, chat_template(data))
    try:
        example = encode(Item((("user", "?"), ("assistant", "!")), "data.max_length"), tokenizer)
    except BadItemError:  # a template that wants more than this
        return f"{data.max_length} tokens"
    if all(label == IGNORED for label in example.labels[: data.max_length]):
        raise DataError(
            f"data.max_length: {data.max_length} tokens hold no item: in the chat template one letter takes "
            f"{len(example.input_ids) - example.num_supervised}, before its answer"
        )
    return f"{data.max_length} tokens"


def _check_model(config: Config, found: Findings) -> str:
    model = config.model
    anatomy = base_anatomy(model, base_config(model, config.data.max_length))
    about = f"{model.name}, {anatomy.num_layers} layers"
    needs = Prerequisites(dry_run=True)
    if config.adapter is None and config.region == "search" and not (config.run / "search" / "region.yaml").is_file():
        found.missing.append("region: `cofitune search` with this config finds it")
        return about
    region, adapter = resolve.find_trained(config.region, config.adapter, config.run / "search", anatomy, needs, None)
    if adapter is not None:
        return f"{about}; {adapter.kind} on {region_text(region)}"
    masked_modules(config.softmask, region, anatomy)
    if config.softmask.apply_to != "none":
        found.missing += [
            f"softmask: `cofitune importance` makes {folder}"
            for folder in importance_folders(config.softmask, config.run)
            if not (folder / "manifest.json").is_file()
        ]
    return f"{about}; region {region_text(region)}, {region.num_parameters(anatomy):,} trained weights"


def _check_source(place: str, source: Source) -> str:
    """Find a source and read its first item; the others are read by a dry run."""
    opened = open_source(data_sources([source])[0])
    where, row = next(iter(opened.rows()))
    read = make_prompt if place == "rehearsal.data" else make_item
    try:
        read(where, row, source.format)
    except BadItemError as error:
        raise DataError(f"{place}: {error}") from None
    size = opened.num_bytes()
    return f"{source.path}, {'on the hub' if size is None else f'{size:,} bytes'}"


def _check_tasks(train: schema.Train, run: Path, asked: schema.Eval, found: Findings) -> None:
    """Read the tasks' items; what a rehearsal is yet to make is missing, not wrong."""
    folder = rehearsal_folder(train, run)
    if (train.rehearsal or train.drift_data) and not (folder / "manifest.json").is_file():
        key = "train.rehearsal" if train.rehearsal else "train.drift_data"
        found.missing.append(f"{key}: `cofitune rehearse` makes {folder}")
    lacking = [task for task in eval_tasks(asked) if lacking_rehearsal(task)]
    found.missing += [f"eval.drift: `cofitune rehearse` makes {task.path}" for task in lacking]
    tasks = [task for task in eval_tasks(asked) if task not in lacking]
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        found.missing.append("eval: the extra `eval` is not installed, so its tasks were not read")
        return
    found.check("eval", lambda: ", ".join(f"{t.task.title} ({len(t.items)})" for t in load_tasks(tasks)))
