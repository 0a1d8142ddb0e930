"""Trials of a search, one after the other in one process a rank: what they share is read once, and never written into.

A trial's scores do not depend on what ran before it: each has a model object of its own around the base's weights, and
an engine, an order of items and random numbers of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.config import schema
from cofitune.config.source import Source
from cofitune.distributed import check_agreement, device
from cofitune.errors import UserError
from cofitune.evaluation.data_parallel import join
from cofitune.evaluation.out_of_memory import explaining_out_of_memory
from cofitune.evaluation.score import ScoreRequest, score_model
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.load import choose_dtype, dtype_name
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.evaluate.plan import EvalPlan, plan_eval
from cofitune.recipes.evaluate.recipe import run_evaluation
from cofitune.recipes.evaluate.targets import EvalTarget
from cofitune.recipes.folders import check_folder, versions_of_packages
from cofitune.recipes.from_config import chat_template, eval_tasks, load_base
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.recipes.train.data import TrainData, read_train_data
from cofitune.recipes.train.plan import plan_train
from cofitune.recipes.trial.executor import Measured, TrialRequest, TrialResult
from cofitune.recipes.trial.loss_items import LossItems, measure_base, read_loss_items
from cofitune.recipes.trial.prefix_cache import start_prefix
from cofitune.recipes.trial.training import Tensors, Trained, train_trial
from cofitune.search.measured import CurvePoint
from cofitune.training.engine import start_distributed
from cofitune.training.hashing import hash_tensors
from cofitune.training.shared_base import SharedBase
from cofitune.training.shared_prefix_cache import SharedPrefix

STEPS_TO_MEASURE = 3  # the last one is timed, the first ones warm up
T = TypeVar("T")


class TrialRunner:
    """Carries out requests on this rank. Every rank has one and must do the same with it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        rank, self.world_size_or_one = start_distributed()
        self._share = join(rank, self.world_size_or_one)
        self._held: dict[str, tuple[object, Any]] = {}  # by what it is: what it was made of, and itself
        self._seconds: dict[str, float] = {}

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank, however long rank 0 waits for it."""
        return self._share.broadcast(value)

    def run(self, request: TrialRequest) -> TrialResult:
        """Train until where the request says, from where an earlier part of it paused, and measure what there is.

        Returns:
            Its seconds are those of `start` (which later requests are spared), `train` and `evaluate`.

        Raises:
            UserError: the training diverged, or a mistake in the config or the data.
            RuntimeError: the base's weights are not what they were, which is our bug.
        """
        self._seconds = {"start": 0.0, "train": 0.0, "evaluate": 0.0}
        base = self._base(request.config.model)
        take = self._measure_losses if request.config.search.measure == "loss" else self._score
        result = take(base, request)
        if changed := base.changed():
            raise RuntimeError(f"a trial changed {len(changed)} of the base's tensors: {', '.join(changed[:5])}")
        return replace(result, seconds=self._seconds)

    def _score(self, base: SharedBase, request: TrialRequest) -> TrialResult:
        """Train, and ask the tasks; the scores are in the request's folder."""
        config = request.config
        plan = replace(self._eval_plan(request), config=config, section=_section(config.search))
        tensors: Tensors = {}
        if request.train:
            trained = self._train(base, request, stop_step=request.stop_step)
            tensors, self._seconds["train"] = trained.tensors, sum(trained.seconds)
        with self._counted("evaluate"):
            self._evaluate(base, plan, tensors)
        return TrialResult(request)

    def _measure_losses(self, base: SharedBase, request: TrialRequest) -> TrialResult:
        """Train, and measure losses and drift on the way; of the base its loss, for its drift is 0."""
        items = self._loss_items(request)
        if request.train:
            trained = self._train(base, request, stop_step=request.stop_step, items=items)
            self._seconds |= {"train": sum(trained.seconds), "evaluate": trained.seconds_measuring}
            return TrialResult(request, curve=trained.curve, margins=trained.margins)
        doing = "the base's losses were measured", items.batch_size
        dtype = dtype_name(choose_dtype(request.config.model.dtype))
        with (
            self._counted("evaluate"),
            explaining_out_of_memory(lambda: doing, dtype, f"{_section(request.config.search)}.batch_size"),
            _in_memory(base, {}) as model,
        ):
            attention = request.config.model.attn_implementation
            loss, margins = measure_base(model, items, any_attention=attention == "auto")
        if loss is None:
            raise UserError("the base's speciality loss is not finite: its weights are damaged")
        return TrialResult(request, curve=(CurvePoint(0, loss, 0.0),), margins=margins)

    def measure(self, request: TrialRequest) -> Measured:
        """Take a few steps in the request's region, and measure once, or ask a few items of each task."""
        self._seconds, config = {"start": 0.0}, request.config
        base = self._base(config.model)
        if config.search.measure == "loss":
            return self._time_losses(base, request)
        plan = self._eval_plan(request)
        trained = self._train(base, request, stop_step=STEPS_TO_MEASURE, saves=False)
        few = self.world_size_or_one * config.eval.known_batch_size  # a batch for every rank
        tasks = load_tasks(replace(t, limit=min(t.limit or few, few)) for t in eval_tasks(config.eval))
        source, size = plan.models[0].source, config.eval.known_batch_size
        with _in_memory(base, trained.tensors) as model:
            asked = ScoreRequest(source.tokenizer, tasks, size, plan.positions, self._share)
            found = score_model(model, asked)
        results = [(task, found[task.task.title]) for task in plan.tasks]
        to_evaluate = sum(result.seconds * len(task.items) / result.items for task, result in results)
        return Measured(self._seconds["start"], trained.seconds[-1], to_evaluate)

    def _time_losses(self, base: SharedBase, request: TrialRequest) -> Measured:
        """What a trial takes whose losses are measured: the margins, which are taken once, are counted each time."""
        config = request.config
        once = config.search.model_copy(update={"train_steps": STEPS_TO_MEASURE, "points": 1, "halving": None})
        short = config.model_copy(
            update={"search": once, "train": config.train.model_copy(update={"max_steps": STEPS_TO_MEASURE})}
        )
        trained = self._train(base, replace(request, config=short), items=self._loss_items(request))
        to_measure = trained.seconds_measuring * len(config.search.measured_steps)
        return Measured(self._seconds["start"], trained.seconds[-1], to_measure)

    def _train(
        self,
        base: SharedBase,
        request: TrialRequest,
        *,
        stop_step: int | None = None,
        saves: bool = True,
        items: LossItems | None = None,
    ) -> Trained:
        """Train on every rank."""
        config = request.config
        prefix = self._prefix(config.search.prefix_cache, config.model, config.run)
        plan = plan_train(
            config, self.world_size_or_one, known_data=self._data(config.model, config.data, config.importance.data)
        )
        return train_trial(base, plan, self._console, stop_step=stop_step, saves=saves, shared=prefix, items=items)

    def _data(self, model: schema.Model, data: schema.Data, general: tuple[Source, ...]) -> TrainData:
        """The training data, the same in every trial."""
        made_of = (model, data, general)
        return self._hold("data", made_of, lambda: read_train_data(model, data, general, Prerequisites()))

    def _loss_items(self, request: TrialRequest) -> LossItems:
        """What losses are measured on, the same in every trial."""
        config, limit = request.config, request.config.search.items_for("loss")
        data = self._data(config.model, config.data, config.importance.data)

        def read() -> LossItems:
            items = read_loss_items(config.eval, config.data.max_length, data, limit)
            check_agreement({"items that losses are measured on": items.sha256()})
            return items

        return self._hold("loss items", (config.model, config.data, config.eval, limit), read)

    def _evaluate(self, base: SharedBase, plan: EvalPlan, tensors: Tensors) -> None:
        """Score the base, unless its answers were handed on, and what was trained."""
        models, config = plan.models[:1], plan.config
        if tensors:
            run = EvalTarget(
                "run", None, config.output_dir, models[0].source,
                delta_sha256=hash_tensors(tensors), dtype=choose_dtype(config.model.dtype), seed=config.train.seed,
            )  # fmt: skip
            models = (*models, run)
        plan = replace(plan, folder=check_folder(config, "eval", False), models=models)

        def weights(model: EvalTarget) -> AbstractContextManager[PreTrainedModel]:
            return _in_memory(base, tensors if model.delta_sha256 else {})

        run_evaluation(plan, self._share, self._console, weights=weights)

    def _base(self, model: schema.Model) -> SharedBase:
        def load() -> SharedBase:
            check_agreement({"model": fingerprint(model.name, model.revision), "packages": versions_of_packages()})
            return SharedBase(load_base(model, with_kernels=True, trains=True))

        return self._hold("base", model, load)

    def _eval_plan(self, request: TrialRequest) -> EvalPlan:
        """The tasks, the tokenizer and what else is asked alike in every trial."""
        config = request.config
        return self._hold("tasks", (config.model, chat_template(config.data), config.eval), lambda: plan_eval(config))

    def _prefix(self, kind: str, model: schema.Model, run: Path) -> SharedPrefix | None:
        """What is kept of the frozen prefix, for every trial of this base."""
        if kind == "none":
            return None
        return self._hold("prefix", (model, kind), lambda: start_prefix(kind, model, run))

    def _hold(self, what: str, made_of: object, make: Callable[[], T]) -> T:
        """What was made before of the same; else it is made, and the earlier one let go."""
        held: T
        before, held = self._held.pop(what, (None, None))
        if held is None or before != made_of:
            del held
            with self._counted("start"):
                held = make()
                gc.collect()
                gc.freeze()  # DeepSpeed collects garbage for each engine, and need not look through what stays
        self._held[what] = (made_of, held)
        return held

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - begun


def _section(search: schema.Search) -> str:
    """Where a trial's tasks are from, as the search's config calls it."""
    return "eval" if search.eval is None else "search.eval"


@contextmanager
def _in_memory(base: SharedBase, tensors: Tensors) -> Iterator[PreTrainedModel]:
    """The base with these tensors in the place of its own, where models are scored."""
    _free_memory()  # of the engine before
    yield base.instantiate(tensors).to(device())
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
