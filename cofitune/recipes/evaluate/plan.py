"""Everything about an evaluation that can be known, and refused, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from cofitune import __version__
from cofitune.config import schema
from cofitune.config.schema import Config, EvalModel
from cofitune.data.encoded import tokenizer_sha256
from cofitune.distributed import device, device_name
from cofitune.errors import UserError
from cofitune.evaluation.batch_size import MOST_ON_GPU, device_memory, powers_down_from
from cofitune.evaluation.cache import AnswerCache
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.lengths import fit_lengths
from cofitune.evaluation.out_of_memory import Doing, explaining_out_of_memory
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import VLLM_ROOM, versions
from cofitune.evaluation.statistics.gate import Requirement, read_requirements
from cofitune.evaluation.tasks import lacking_rehearsal, load_tasks
from cofitune.files import sha256_json
from cofitune.model.attention import check_attention
from cofitune.model.load import choose_dtype, dtype_name
from cofitune.model.vllm_engine import check_vllm, vllm_version
from cofitune.recipes.evaluate.batches import AUTO, asking_memory
from cofitune.recipes.evaluate.models import find_models
from cofitune.recipes.evaluate.targets import EvalTarget
from cofitune.recipes.folders import check_folder, package_version, versions_of_packages
from cofitune.recipes.from_config import NOT_ASKED, chat_template, eval_tasks, kernels_recorded, written_day
from cofitune.rehearsal.items import check_base
from cofitune.training.delta import read_manifest

VLLM_ITEMS = 1024  # handed over at once; of a task that is stopped so many are lost
Results = dict[str, dict[str, TaskResult]]  # by model, by task title


@dataclass(frozen=True)
class EvalPlan:
    """An evaluation, resolved: all that is known before weights load.

    Attributes:
        config: what it was resolved from.
        folder: where the scores go.
        models: the base first.
        settings: what all answers depend on besides weights and tasks; its batch_size is a number, or where that was
            chosen one of each task, by title.
        positions: tokens that the models can attend to.
        requirements: the gate.
        section: the tasks' section, as the config calls it.
        missing: what a dry run could not find but the evaluation will need.
    """

    config: Config
    folder: Path
    models: tuple[EvalTarget, ...]
    tasks: tuple[LoadedTask, ...]
    settings: dict[str, Any]
    positions: int | None
    requirements: list[Requirement]
    section: str = "eval"
    missing: tuple[str, ...] = ()

    @property
    def cache(self) -> AnswerCache:
        """Where answers are kept."""
        return AnswerCache(self.folder / "cache")

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Items that are asked at once, of each task by its title."""
        size = self.settings["batch_size"]
        return {t.task.title: size if isinstance(size, int) else size[t.task.title] for t in self.tasks}

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM answers."""
        return self.config.eval.engine == "vllm"

    @property
    def vllm_length(self) -> int:
        """Tokens that vLLM needs room for: the longest item's and a few more, as far as the models have positions."""
        longest = max(t.longest_whole for t in self.tasks) + VLLM_ROOM
        return longest if self.positions is None else min(longest, self.positions + 1)

    @property
    def about_tasks(self) -> dict[str, dict[str, object]]:
        """What each task's score depends on, by title, as scores.json tells it."""
        return {t.task.title: _about(t) for t in self.tasks}

    def key(self, model: EvalTarget, loaded: LoadedTask) -> dict[str, object]:
        """All that one model's answers to one task depend on, by content."""
        task = {k: v for k, v in asdict(loaded.task).items() if k not in NOT_ASKED}
        task |= {"data_sha256": loaded.sha256, "unusable": loaded.unusable}
        task |= {"left_out": loaded.left_out, "asked_sha256": loaded.asked_sha256}
        task |= {"cut": loaded.cut, "cut_to": self.positions} if loaded.cut else {}
        settings = {name: value for name, value in self.settings.items() if name != "kernels"}
        settings |= {} if self.uses_vllm else kernels_recorded(self.config.model, model.source.model_type)
        settings |= {"batch_size": self.batch_sizes[loaded.task.title]}
        return {"model": model.weights, "task": task, "settings": settings}

    @property
    def asked_day(self) -> str | None:
        """What a template that writes the date writes in all prompts, as year-month-day."""
        return chat_template(self.config.data).day

    @property
    def of_other_days(self) -> list[EvalTarget]:
        """Runs that were trained under another date than all are asked under, where the template writes one."""
        return [model for model in self.models if model.day not in (None, self.asked_day)]

    def agreed(self) -> dict[str, object]:
        """What all ranks must have found alike; their GPUs may be of several models, as rank 0's names the answers."""
        alike = replace(self, settings={**self.settings, "device": device().type})
        asked = {
            m.name: {t.task.title: f"{len(t.items)} items, {sha256_json(alike.key(m, t))}" for t in self.tasks}
            for m in self.models
        }
        return {"packages": versions_of_packages(), "settings": alike.settings, "models": asked}

    def with_batches(self, sizes: dict[str, int]) -> EvalPlan:
        """The same with other sizes of batches, by task."""
        return replace(self, settings=self.settings | {"batch_size": sizes})

    def explaining_out_of_memory(self, doing: Doing) -> AbstractContextManager[None]:
        """Around what loads or asks a model; `doing` says what that is, and how many items are asked at once."""
        return explaining_out_of_memory(doing, self.settings["dtype"], f"{self.section}.batch_size")

    def known(self) -> Results:
        """What was answered before."""
        found: Results = {}
        for model in self.models:
            results = ((t.task.title, self.cache.get(self.key(model, t), t)) for t in self.tasks)
            found[model.name] = {title: result for title, result in results if result is not None}
        return found


def plan_eval(
    config: Config,
    overwrite: bool = False,
    require: Sequence[str] = (),
    planned_runs: Sequence[EvalModel] = (),
    dry_run: bool = False,
) -> EvalPlan:
    """Read the tasks, the models' configs and tokenizers, and check everything that the user could have got wrong.

    Args:
        planned_runs: runs that are not trained yet: what can be known of them is checked, and nothing can be asked.
        dry_run: note what another command is yet to make, in place of a refusal.

    Raises:
        UserError: no task is named; a file, an item, a package, a model or the output folder cannot be used; models
            cannot stand side by side; a requirement is malformed.
    """
    folder = check_folder(config, "eval", overwrite)
    if config.eval.engine == "vllm":
        check_vllm("eval.engine")
    else:
        check_attention(config.model.attn_implementation)
    grading = versions()  # or a refusal
    wanted = eval_tasks(config.eval)
    lacking = {task.title: error for task in wanted if dry_run and (error := lacking_rehearsal(task))}
    tasks = load_tasks(task for task in wanted if task.title not in lacking)
    if not wanted:
        raise UserError(
            "eval: names no task; for example eval: {speciality: [{path: data/law_test.jsonl, kind: generate}]}"
        )
    models = find_models(config.model, config.eval.models, config.run, data=config.data, planned_runs=planned_runs)
    missing = [str(error) for error in lacking.values()]
    if dry_run and len(models) == 1:
        missing.append(f"no finished training in {config.run / 'train'}; run `cofitune train` first, to score it")
    _check_reasoning(models, tasks)
    _check_engine(config.eval.engine, tasks)
    base = models[0].source
    positions = _positions(config.eval.engine, models)
    for loaded in tasks:
        if loaded.rehearsal is not None:
            made_by = base.name, base.fingerprint, tokenizer_sha256(base.tokenizer)
            check_base(loaded.rehearsal, *made_by, written_day(base.tokenizer, config.data))
    tasks = fit_lengths(tasks, base.tokenizer, positions)
    plan = EvalPlan(
        config=config,
        folder=folder,
        models=models,
        tasks=tasks,
        settings=_settings(config.model, config.eval, models, grading),
        positions=positions,
        requirements=_requirements(require, models, tasks),
        missing=tuple(missing),
    )
    if config.eval.batch_size != AUTO:
        return plan
    if plan.uses_vllm:
        return plan.with_batches({t.task.title: VLLM_ITEMS for t in plan.tasks})
    return _with_chosen_batches(plan, overwrite)


def _positions(engine: str, models: Sequence[EvalTarget]) -> int | None:
    """Tokens that a prompt and its answer may have; None where no model says."""
    positions = min((m.source.positions for m in models if m.source.positions is not None), default=None)
    if positions is not None and engine == "vllm":
        positions -= 1  # it generates a token even where it only reads
    return positions


def _settings(
    model: schema.Model, asked: schema.Eval, models: Sequence[EvalTarget], grading: dict[str, str]
) -> dict[str, Any]:
    """What all answers depend on besides weights and tasks, as the config has it."""
    versions_of_engine = {}
    if asked.engine == "vllm":  # whose kernels are its own
        engine: dict[str, object] = {"engine": "vllm"}
        versions_of_engine["vllm"] = vllm_version()
    else:
        kernels = [kernels_recorded(model, one.source.model_type) for one in models]  # or one that has none
        engine = {"attn_implementation": model.attn_implementation, **kernels[0]}
        if model.has_flash_attention:
            versions_of_engine["flash-attn"] = package_version("flash-attn")
    return {
        "dtype": dtype_name(choose_dtype(model.dtype)),
        **engine,
        "batch_size": asked.batch_size,
        "device": device_name(),
        "trust_remote_code": model.trust_remote_code,
        **models[0].source.asked,
        "versions": {
            "cofitune": __version__,
            **grading,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": package_version("tokenizers"),
            **versions_of_engine,
        },
    }


def _requirements(
    require: Sequence[str], models: Sequence[EvalTarget], tasks: Sequence[LoadedTask]
) -> list[Requirement]:
    """The gate; a requirement that names no model means the run, or the only one beside the base."""
    compared = [m.name for m in models[1:]]
    meant = "run" if "run" in compared else compared[0] if len(compared) == 1 else None
    counted = {t.task.title: t.task.category for t in tasks if t.metric.unit == "share"}
    return read_requirements(require, counted, compared, meant)


def _with_chosen_batches(plan: EvalPlan, overwrite: bool) -> EvalPlan:
    """Ask as many items at once as fit.

    A task that all models have answered is not asked again, however large its batches were; one that some have answered
    is asked as then, where that fits.
    """
    needed, here = asking_memory(plan.config.model, plan.models, plan.tasks), device_memory()
    sizes = {}
    for loaded in plan.tasks:
        title = loaded.task.title
        sizes[title] = fitting = needed.batch(title, here)
        for size in powers_down_from(MOST_ON_GPU) if not overwrite else ():
            before = plan.with_batches({t.task.title: size for t in plan.tasks})
            kept = [plan.cache.holds(before.key(model, loaded)) for model in plan.models]
            if all(kept) or (size <= fitting and any(kept)):
                sizes[title] = size
                break
    return plan.with_batches(sizes)


def _check_engine(engine: str, tasks: Sequence[LoadedTask]) -> None:
    """Raise a UserError where vLLM is asked for what it cannot measure."""
    drift = [t.task.title for t in tasks if t.rehearsal is not None]
    if engine == "vllm" and drift:
        raise UserError(
            f"eval.engine: vllm cannot measure '{drift[0]}': drift compares with probabilities that transformers has "
            "computed, token by token; leave eval.drift out, or use transformers"
        )


def _check_reasoning(models: Sequence[EvalTarget], tasks: Sequence[LoadedTask]) -> None:
    """Raise a UserError where a run has learned to think first, and would be asked to answer at once."""
    at_once = [t.task.title for t in tasks if t.task.kind in ("generate", "ifeval") and t.task.think_end_token is None]
    for model in models if at_once else ():
        items = read_manifest(model.train).get("items", ()) if model.train else ()
        kept, reasoning = (sum(account.get(name, 0) for account in items) for name in ("kept", "reasoning"))
        if 2 * reasoning > kept:
            raise UserError(
                f"'{model.name}' ({model.path}) has learned to think before it answers ({reasoning:,} of {kept:,} "
                f"items), and '{at_once[0]}' asks for the answer at once: set eval.think_end_token, for example "
                "</think>, which lets all models think, and leave room in max_new_tokens"
            )


def _about(loaded: LoadedTask) -> dict[str, object]:
    """What a task's score depends on, as scores.json tells it."""
    fields = asdict(loaded.task) | {"stop": list(loaded.task.stop)} | asdict(loaded.metric)
    fields |= {"metric": fields.pop("name"), "unusable": list(loaded.unusable)}
    fields |= {"left_out": list(loaded.left_out), "cut": list(loaded.cut), "too_long": list(loaded.too_long)}
    fields |= {"unread": dict(loaded.unread)} if loaded.unread else {}
    del fields["title"]
    return fields | {"items": len(loaded.items), "chance": loaded.chance, "sha256": loaded.sha256}
