"""`cofitune eval`: ask every model the same items, except what was asked before; show what was learnt and forgotten."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.checked import shaped
from cofitune.config.schema import Config
from cofitune.data.chat import end_ids
from cofitune.distributed import check_agreement, device
from cofitune.errors import UserError
from cofitune.evaluation.data_parallel import BatchSharding, join
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import ScoreRequest, score_model, score_with_vllm
from cofitune.evaluation.statistics.gate import Verdict, judge
from cofitune.files import check_unlocked, exclusive
from cofitune.model.anatomy import read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import DTYPES
from cofitune.model.vllm_engine import check_vllm, vllm_model
from cofitune.model.weight_files import weight_files
from cofitune.ranks import Rank
from cofitune.recipes.alpha.recipe import choose_alphas, read_chosen
from cofitune.recipes.evaluate.batches import AUTO
from cofitune.recipes.evaluate.plan import EvalPlan, Results, plan_eval
from cofitune.recipes.evaluate.plan_report import plan_facts, print_plan, tell_left_out
from cofitune.recipes.evaluate.result import find_changed, make_scores, print_result, score_changes, write_result
from cofitune.recipes.evaluate.targets import EvalTarget
from cofitune.recipes.folders import start_folder
from cofitune.recipes.from_config import load_base
from cofitune.recipes.merged import MergeSource, merged_for_a_while
from cofitune.recipes.on_plan import OnPlan
from cofitune.recipes.summary import write_summary
from cofitune.reports.console import say, show_status
from cofitune.reports.evaluation.progress import EvalProgress
from cofitune.reports.evaluation.scores import GateVerdict
from cofitune.reports.evaluation.table import verdict_line
from cofitune.reports.text import number
from cofitune.training.delta import delta_applied, read_delta

WHAT = "evaluation"  # in messages
Ask = Callable[..., object]  # with the request, `on_start` and `on_result`
Weights = Callable[[EvalTarget], AbstractContextManager[PreTrainedModel]]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` leaves: the folder with scores.json, and the gate's verdicts."""

    folder: Path
    verdicts: tuple[Verdict, ...] = ()

    @property
    def met(self) -> bool:
        """Whether every requirement is met."""
        return all(verdict.met for verdict in self.verdicts)


def evaluate(
    config: Config,
    *,
    require: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    rank: Rank | None = None,
    on_plan: OnPlan | None = None,
) -> Evaluation:
    """Score the base, the run and every further model on the same items and compare them, in `<output_dir>/eval`.

    Answers are kept by all that they depend on: a second call loads no weights, and a new model, task or delta is all
    that is scored. An interrupted call continues with the next unfinished task.

    Args:
        config: reads its sections model, data (the template) and eval; the run is `<output_dir>/train`.
        require: requirements on the changes against the base, such as `versatility>=-1.0` (evaluation/gate.py).
        overwrite: score everything again, and replace a folder of another config.
        dry_run: print the plan and write nothing.
        console: where to talk; default: the terminal.
        on_plan: is told of a dry run's plan.
        rank: this process, where several ranks call this together and share the batches; None: it is alone.

    Raises:
        UserError: anything that the user can mend, found before weights load; or weights that give no numbers.
    """
    console = console or Console()
    rank = rank or Rank()
    plan = plan_evaluation(config, overwrite, require, console=console, dry_run=dry_run, alone=rank.world_size == 1)
    if dry_run:
        known = {m.name: {} for m in plan.models} if overwrite else plan.known()
        print_plan(plan, known, console, overwrite)
        if on_plan:
            on_plan(plan_facts(plan, known))
        return Evaluation(plan.folder)
    return run_evaluation(plan, join(rank.rank, rank.world_size), console, overwrite=overwrite)


def plan_evaluation(
    config: Config,
    overwrite: bool = False,
    require: Sequence[str] = (),
    *,
    console: Console,
    dry_run: bool = False,
    alone: bool = True,
) -> EvalPlan:
    """Make the plan, and before it the alphas of models with `alpha: auto` that have not been chosen yet.

    Everything else is checked before the first of them is measured. A dry run measures nothing.

    Args:
        alone: whether this process is the only one; several ranks find the choice made.

    Raises:
        UserError: as `plan_eval` and `choose_alpha`; or several ranks find an alpha that is not chosen.
    """
    known, waiting = read_chosen(config)
    # of a model to come nothing is known, whichever alpha between base and run it gets
    plan = plan_eval(known, overwrite, require, [model.at(0.5) for model in waiting], dry_run)
    plan = replace(plan, config=config)  # as the user wrote it: the folder keeps `alpha: auto`
    if not waiting:
        return plan
    if dry_run:
        for model in waiting:
            line = f"{model.title}: its alpha is chosen first, on the development items of {model.path}"
            say(console, line)
        return plan
    if not alone:
        raise UserError(
            f"eval.models: the alpha of {waiting[0].path}@auto is chosen in one process: by `cofitune eval` before it "
            "starts ranks, or by `cofitune export --alpha auto`"
        )
    return replace(plan_eval(choose_alphas(config, console), overwrite, require), config=config)


def takes_all_gpus(config: Config, asked_for_ranks: bool) -> bool:
    """Whether one process answers with vLLM, on all GPUs, so that no ranks are to be started.

    Raises:
        UserError: vLLM is asked for, and several ranks as well; or it is not installed.
    """
    if config.eval.engine == "vllm":
        check_vllm("eval.engine", asked_for_ranks)
    return config.eval.engine == "vllm"


def check(config: Config, overwrite: bool, require: Sequence[str], console: Console) -> EvalPlan:
    """The plan for ranks that will be started, unless another process evaluates here.

    Raises:
        UserError: one does; or as `plan_evaluation`.
    """
    check_unlocked(config.run / "eval", WHAT)
    return plan_evaluation(config, overwrite, require, console=console)


def run_evaluation(
    plan: EvalPlan,
    share: BatchSharding,
    console: Console,
    *,
    overwrite: bool = False,
    weights: Weights | None = None,
) -> Evaluation:
    """Do what the plan says: ask what has not been answered yet, and write scores and answers. All of `share` call.

    Args:
        weights: gives a model in memory, where it is to be asked; None: they are loaded from their files.

    Raises:
        UserError: weights that cannot be loaded, or give no numbers.
    """
    with ExitStack() as lock:

        def start() -> None:
            lock.enter_context(exclusive(plan.folder, WHAT))
            start_folder(plan.config, "eval", overwrite)
            tell_left_out(plan, console)

        share.barrier()  # every rank has read its plan before rank 0 changes the folder
        if plan.config.eval.batch_size == AUTO:  # devices may differ, and batches must not
            plan = plan.with_batches(share.least(plan.batch_sizes))
        check_agreement(plan.agreed(), share.group)
        share.run_on_rank_zero(start)
        return _evaluate(plan, share, console, weights)


def _evaluate(plan: EvalPlan, share: BatchSharding, console: Console, weights: Weights | None) -> Evaluation:
    """What `run_evaluation` does once the folder is its own."""
    results = share.broadcast(plan.known() if share.rank == 0 else {})
    if asked := sum(len(result) for result in results.values()):
        say(console, f"{asked} of {len(plan.models) * len(plan.tasks)} results as scored before")
    todo = [m for m in plan.models if len(results[m.name]) < len(plan.tasks)]
    if weights is None and plan.uses_vllm:
        _score_with_vllm(todo, plan, results, share, console)
    elif weights is None:
        _load_and_score(todo, plan, results, share, console)
    else:
        for model in todo:
            with weights(model) as whole:
                _score(plan, model, partial(score_model, whole), results[model.name], share, console)
    if share.rank != 0:
        return Evaluation(plan.folder)
    scores = make_scores(plan, results)
    verdicts = judge(plan.requirements, score_changes(scores))
    changed = find_changed(plan, results, scores)
    write_result(plan, results, scores | {"gate": [v.as_dict() for v in verdicts]}, changed)
    write_summary(plan.config.run)
    print_result(plan, scores, changed, console)
    for verdict in verdicts:
        say(console, verdict_line(shaped(GateVerdict, verdict.as_dict())))
    return Evaluation(plan.folder, tuple(verdicts))


def _load_and_score(
    todo: list[EvalTarget], plan: EvalPlan, results: Results, share: BatchSharding, console: Console
) -> None:
    """Every base is loaded once, its runs' deltas are put in and taken out."""
    places = {model.source.place: index for index, model in reversed(list(enumerate(plan.models)))}
    todo.sort(key=lambda m: places[m.source.place])  # stable, so that the base comes before its runs
    for (name, revision), group in groupby(todo, key=lambda m: m.source.place):
        requested = plan.config.model.model_copy(update={"name": name, "revision": revision})
        with show_status(console, f"loading {name}"), _explaining_loading(plan, name):
            weights = load_base(requested, with_kernels=True).to(device())
        for model in group:
            with _with_delta(weights, model):
                _score(plan, model, partial(score_model, weights), results[model.name], share, console)
        del weights  # its memory must be back before the next one loads
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _score_with_vllm(
    todo: list[EvalTarget], plan: EvalPlan, results: Results, share: BatchSharding, console: Console
) -> None:
    """Every model is loaded whole, one after the other; a run is merged first."""
    dtype, trusted = str(plan.settings["dtype"]), plan.config.model.trust_remote_code
    for model in todo:
        with ExitStack() as stack:
            place = model.source.place
            if model.train is not None:
                files = weight_files(*place, code=trusted)
                source = MergeSource(Path(model.path), model.train, place, files, DTYPES[dtype], trusted)
                with show_status(console, f"merging {model.path}"):
                    place = str(stack.enter_context(merged_for_a_while(source, model.alpha, plan.folder))), None
            loaded = vllm_model(*place, dtype=dtype, max_length=plan.vllm_length, trust_remote_code=trusted)
            with show_status(console, f"loading {model.path} into vLLM"):
                whole = stack.enter_context(loaded)
            ends = end_ids(model.source.tokenizer, read_generation_config(*place, read_model_config(*place, trusted)))
            ask = partial(score_with_vllm, whole, ends=sorted(ends))
            _score(plan, model, ask, results[model.name], share, console)


def _explaining_loading(plan: EvalPlan, name: str) -> AbstractContextManager[None]:
    return plan.explaining_out_of_memory(lambda: (f"{name} was loaded", 1))


@contextmanager
def _with_delta(weights: PreTrainedModel, model: EvalTarget) -> Iterator[None]:
    if model.train is None:
        yield
        return
    with delta_applied(weights, read_delta(model.train, model.source.fingerprint), model.alpha):
        yield


def _score(
    plan: EvalPlan,
    model: EvalTarget,
    ask: Ask,
    results: dict[str, TaskResult],
    share: BatchSharding,
    console: Console,
) -> None:
    """Score one model on the tasks that it lacks; each answer is kept as soon as its task is done.

    Args:
        ask: `score_model` or `score_with_vllm`, with the model.
    """
    width = max(len(m.name) for m in plan.models)
    missing = {t.task.title: t for t in plan.tasks if t.task.title not in results}
    asked = next(iter(missing))
    with EvalProgress(console, model.name, sum(len(t.items) for t in missing.values())) as progress:

        def begin(loaded: LoadedTask) -> None:
            nonlocal asked
            asked = loaded.task.title
            progress.start(loaded.task.title, len(loaded.items))

        def keep(result: TaskResult) -> None:
            if not result.are_numbers:
                raise UserError(
                    f"'{model.name}' ({model.path}) gives log-likelihoods that are no numbers (task '{result.title}'): "
                    "its weights are damaged; did its training diverge?"
                )
            results[result.title] = result
            if share.rank != 0:
                return
            plan.cache.put(plan.key(model, missing[result.title]), result)
            say(
                console,
                f"{model.name:<{width}} {result.title}: {result.metric.name} {number(result.raw, 3)} of {result.items} "
                f"items ({result.seconds:.0f} s)",
            )

        request = ScoreRequest(
            tokenizer=model.source.tokenizer,
            tasks=tuple(missing.values()),
            batch_size=plan.batch_sizes,
            positions=plan.positions,
            share=replace(share, on_progress=progress.advance),
        )
        with plan.explaining_out_of_memory(lambda: (f"'{model.name}' was asked '{asked}'", plan.batch_sizes[asked])):
            ask(request, on_start=begin, on_result=keep)
