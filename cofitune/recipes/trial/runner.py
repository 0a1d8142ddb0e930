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
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.config.schema import Config
from cofitune.distributed import device
from cofitune.evaluation.data_parallel import join
from cofitune.evaluation.score import score_model
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.load import choose_dtype
from cofitune.recipes.evaluate.models import EvalTarget
from cofitune.recipes.evaluate.plan import Plan, make_plan
from cofitune.recipes.evaluate.recipe import run_evaluation
from cofitune.recipes.folders import check_folder
from cofitune.recipes.from_config import base_config, eval_tasks, load_base
from cofitune.recipes.train.data import read_train_data
from cofitune.recipes.train.plan import plan_training
from cofitune.recipes.trial.executor import Measured, TrialRequest
from cofitune.recipes.trial.prefix_cache import start_prefix
from cofitune.recipes.trial.training import Tensors, Trained, train_trial
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
        self._held: dict[str, tuple[Any, Any]] = {}  # by what it is: what it was made of, and itself
        self._seconds: dict[str, float] = {}

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank, however long rank 0 waits for it."""
        return self._share.broadcast(value)

    def run(self, request: TrialRequest) -> dict[str, float]:
        """Train until where the request says, from where an earlier part of it paused, and score what there is.

        Returns:
            Seconds of `start` (which later requests are spared), `train` and `evaluate`.

        Raises:
            UserError: the training diverged, or a mistake in the config or the data.
            RuntimeError: the base's weights are not what they were, which is our bug.
        """
        self._seconds = {"start": 0.0, "train": 0.0, "evaluate": 0.0}
        config = request.config
        base, plan = self._base(config), self._eval_plan(config)
        tensors: Tensors = {}
        if request.train:
            trained = self._train(base, config, request.stop_step)
            tensors, self._seconds["train"] = trained.tensors, sum(trained.seconds)
        with self._counted("evaluate"):
            self._evaluate(base, plan, config, tensors)
        if changed := base.changed():
            raise RuntimeError(f"a trial changed {len(changed)} of the base's tensors: {', '.join(changed[:5])}")
        return self._seconds

    def measure(self, config: Config) -> Measured:
        """Take a few steps in the config's region, and ask a few items of each task."""
        self._seconds = {"start": 0.0}
        base, plan = self._base(config), self._eval_plan(config)
        trained = self._train(base, config, STEPS_TO_MEASURE, saves=False)
        few = self.world_size_or_one * config.eval.batch_size  # a batch for every rank
        tasks = load_tasks(replace(t, limit=min(t.limit or few, few)) for t in eval_tasks(config.eval))
        source, size = plan.models[0].source, config.eval.batch_size
        with _in_memory(base, trained.tensors) as model:
            found = score_model(model, source.tokenizer, tasks, size, share=self._share, positions=plan.positions)
        results = [(task, found[task.task.title]) for task in plan.tasks]
        to_evaluate = sum(result.seconds * len(task.items) / result.items for task, result in results)
        return Measured(self._seconds["start"], trained.seconds[-1], to_evaluate)

    def _train(self, base: SharedBase, config: Config, stop_step: int | None, saves: bool = True) -> Trained:
        """Train on every rank."""
        model_config = base_config(config.model)
        made_of = (config.model, config.data)
        data = self._hold("data", made_of, lambda: read_train_data(config, model_config, False, []))
        prefix = self._prefix(config)
        plan = plan_training(config, self.world_size_or_one, known_data=data)
        return train_trial(base.instantiate(), config, plan, stop_step, saves, prefix, self._console)

    def _evaluate(self, base: SharedBase, plan: Plan, config: Config, tensors: Tensors) -> None:
        """Score the base, unless its answers were handed on, and what was trained."""
        models = plan.models[:1]
        if tensors:
            run = EvalTarget(
                "run", None, config.output_dir, models[0].source,
                delta_sha256=hash_tensors(tensors), dtype=choose_dtype(config.model.dtype), seed=config.train.seed,
            )  # fmt: skip
            models = (*models, run)
        plan = replace(plan, folder=check_folder(config, "eval", False), models=models)

        def weights(model: EvalTarget) -> AbstractContextManager[PreTrainedModel]:
            return _in_memory(base, tensors if model.delta_sha256 else {})

        run_evaluation(plan, config, self._share, self._console, weights=weights)

    def _base(self, config: Config) -> SharedBase:
        return self._hold("base", config.model, lambda: SharedBase(load_base(config.model)))

    def _eval_plan(self, config: Config) -> Plan:
        """The tasks, the tokenizer and what else is asked alike in every trial."""
        return self._hold("tasks", (config.model, config.data.template, config.eval), lambda: make_plan(config))

    def _prefix(self, config: Config) -> SharedPrefix | None:
        """What is kept of the frozen prefix, for every trial of this base."""
        kind = config.search.prefix_cache
        if kind == "none":
            return None
        return self._hold("prefix", (config.model, kind), lambda: start_prefix(config))

    def _hold(self, what: str, made_of: Any, make: Callable[[], T]) -> T:
        """What was made before of the same; else it is made, and the earlier one let go."""
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
