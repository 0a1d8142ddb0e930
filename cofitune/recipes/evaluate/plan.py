"""Everything about an evaluation that can be known, and refused, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from cofitune import __version__
from cofitune.config.schema import Config, EvalModel
from cofitune.data.encoded import tokenizer_sha256
from cofitune.errors import UserError
from cofitune.evaluation.cache import AnswerCache
from cofitune.evaluation.lengths import fit_lengths
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import versions
from cofitune.evaluation.statistics.gate import Requirement, read_requirements
from cofitune.evaluation.tasks import LoadedTask, load_tasks
from cofitune.model.load import choose_dtype
from cofitune.ranks import this_rank
from cofitune.recipes.evaluate.models import Scored, find_models
from cofitune.recipes.folders import check_folder
from cofitune.recipes.from_config import eval_tasks
from cofitune.rehearsal.items import check_base

NOT_ASKED = ("title", "category", "path", "on_bad_item")  # of a task, what no answer depends on
Results = dict[str, dict[str, TaskResult]]  # by model, by task title


@dataclass(frozen=True)
class Plan:
    """All that is known before weights load.

    Attributes:
        folder: where the scores go.
        models: the base first.
        settings: what all answers depend on besides weights and tasks.
        positions: tokens that the models can attend to.
        requirements: the gate.
    """

    folder: Path
    models: tuple[Scored, ...]
    tasks: tuple[LoadedTask, ...]
    settings: dict[str, Any]
    positions: int | None
    requirements: list[Requirement]

    @property
    def cache(self) -> AnswerCache:
        """Where answers are kept."""
        return AnswerCache(self.folder / "cache")

    @property
    def about_tasks(self) -> dict[str, dict[str, Any]]:
        """What each task's score depends on, by title, as scores.json tells it."""
        return {t.task.title: _about(t) for t in self.tasks}

    def key(self, model: Scored, loaded: LoadedTask) -> dict[str, Any]:
        """All that one model's answers to one task depend on, by content."""
        task = {k: v for k, v in asdict(loaded.task).items() if k not in NOT_ASKED}
        task |= {"data_sha256": loaded.sha256, "unusable": loaded.unusable}
        task |= {"left_out": loaded.left_out, "asked_sha256": loaded.asked_sha256}
        task |= {"cut": loaded.cut, "cut_to": self.positions} if loaded.cut else {}
        return {"model": model.weights, "task": task, "settings": self.settings}

    def known(self) -> Results:
        """What was answered before."""
        found: Results = {}
        for model in self.models:
            results = ((t.task.title, self.cache.get(self.key(model, t), t)) for t in self.tasks)
            found[model.name] = {title: result for title, result in results if result is not None}
        return found


def make_plan(
    config: Config, overwrite: bool = False, require: Sequence[str] = (), to_come: Sequence[EvalModel] = ()
) -> Plan:
    """Read the tasks, the models' configs and tokenizers, and check everything that the user could have got wrong.

    Args:
        to_come: runs that are not trained yet: what can be known of them is checked, and nothing can be asked.

    Raises:
        UserError: no task is named; a file, an item, a package, a model or the output folder cannot be used; models
            cannot stand side by side; a requirement is malformed.
    """
    folder = check_folder(config, "eval", overwrite)
    grading = versions()
    tasks = load_tasks(eval_tasks(config.eval))
    if not tasks:
        raise UserError(
            "eval: names no task; for example eval: {speciality: [{path: data/law_test.jsonl, kind: generate}]}"
        )
    models = find_models(config, to_come)
    base = models[0].source
    known = [m.source.positions for m in models if m.source.positions is not None]
    positions = min(known, default=None)
    for loaded in tasks:
        if loaded.rehearsal is not None:
            check_base(loaded.rehearsal, base.name, base.fingerprint, tokenizer_sha256(base.tokenizer))
    tasks = fit_lengths(tasks, base.tokenizer, positions)
    settings = {
        "dtype": str(choose_dtype(config.model.dtype)).removeprefix("torch."),
        "attn_implementation": config.model.attn_implementation,
        "batch_size": config.eval.batch_size,
        "device": device().type,
        **base.asked,
        "versions": {
            "cofitune": __version__,
            **grading,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    compared = [m.name for m in models[1:]]
    meant = "run" if "run" in compared else compared[0] if len(compared) == 1 else None
    counted = {t.task.title: t.task.category for t in tasks if t.metric.unit == "share"}
    requirements = read_requirements(require, counted, compared, meant)
    return Plan(folder, models, tasks, settings, positions, requirements)


def _about(loaded: LoadedTask) -> dict[str, Any]:
    """What a task's score depends on, as scores.json tells it."""
    fields = asdict(loaded.task) | {"stop": list(loaded.task.stop)} | asdict(loaded.metric)
    fields |= {"metric": fields.pop("name"), "unusable": list(loaded.unusable)}
    fields |= {"left_out": list(loaded.left_out), "cut": list(loaded.cut), "too_long": list(loaded.too_long)}
    del fields["title"]
    return fields | {"items": len(loaded.items), "chance": loaded.chance, "sha256": loaded.sha256}


def print_plan(plan: Plan, known: Results, console: Console) -> None:
    """Say what is asked of which model, what is known already, and what will be written."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("category", "task", "kind", "metric"):
        table.add_column(name)
    for name in ("items", "longest prompt, tokens"):
        table.add_column(name, justify="right")
    for loaded in plan.tasks:
        task = loaded.task
        items, tokens = f"{len(loaded.items):,}", f"{loaded.longest:,}"
        table.add_row(task.category, task.title, task.kind, loaded.metric.name, items, tokens)
    console.print(table)
    tell_left_out(plan, console)
    models = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("model", "role", "path", "to score"):
        models.add_column(name, overflow="fold")
    for model in plan.models:
        missing = [t.task.title for t in plan.tasks if t.task.title not in known[model.name]]
        todo = "nothing: as scored before" if not missing else "all" if not known[model.name] else ", ".join(missing)
        models.add_row(model.name, model.role or "", model.path, todo)
    console.print(models)
    settings = plan.settings
    console.print(
        f"asked    {plan.positions or 'unlimited'} positions, {settings['dtype']} on {settings['device']}, batches of "
        f"{settings['batch_size']}, template {settings['template']}\n"
        f"writes   {plan.folder}/: scores.json, samples/<model>/<task>.jsonl, changed/<model>/, cache/, config.yaml",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def tell_left_out(plan: Plan, console: Console) -> None:
    """Say which items are asked of no model, and which prompts the harness cuts."""
    for loaded in plan.tasks:
        of = f"of {len(loaded.items) + len(loaded.left_out) + len(loaded.unusable)} items"
        for lines, what in (
            (loaded.unusable, "are left out; they cannot be asked or judged"),
            (loaded.left_out, f"are left out; with their answers they exceed the model's {plan.positions} positions"),
            (loaded.too_long, f"have no right answer within max_new_tokens: {loaded.task.max_new_tokens}"),
            (loaded.cut, f"exceed {plan.positions} positions, and the harness cuts their prompts from the left"),
        ):
            if lines:
                shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
                text = f"{loaded.task.title}: {len(lines)} {of} {what} (lines {shown})"
                console.print(text, markup=False, highlight=False, soft_wrap=True)


def device() -> torch.device:
    """Where models are scored: on this rank's GPU, where there is one."""
    count = torch.cuda.device_count()
    return torch.device("cuda", this_rank().device(count)) if count else torch.device("cpu")
