"""Score a model in memory on tasks of ours through lm-evaluation-harness (EleutherAI, MIT), one task at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cofitune.evaluation import ifeval, metrics
from cofitune.evaluation.asked import Asked, ask_item
from cofitune.evaluation.data_parallel import BatchSharding
from cofitune.evaluation.drift import score_drift
from cofitune.evaluation.harness.native import score_harness
from cofitune.evaluation.harness.quiet import quiet_harness
from cofitune.evaluation.items import EvalItem, EvalTask, LoadedTask
from cofitune.evaluation.lengths import fit_lengths, max_positions
from cofitune.evaluation.samples import Sample, TaskResult

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from vllm import LLM

METRIC = "score"  # our name for a task's one metric inside the harness
VLLM_ROOM = 3  # tokens: vLLM generates one even where it only reads, and the harness keeps two of a window free
OWN_CODE = ("data", "evaluation", "model", "training/drift.py", "training/head_loss.py", "training/loss.py")
LOSS_METRICS = ("nats_per_token", "nats_per_byte")
# what answers a task: of ours the items as they are asked, None for the harness's own
Answerer = Callable[["EvalTask", int, "Sequence[Asked] | None"], "LM"]


@dataclass(frozen=True)
class ScoreRequest:
    """What models are asked, and how.

    Attributes:
        tokenizer: with the template of the training, and a padding token.
        tasks: from `cofitune.evaluation.tasks.load_tasks`.
        batch_size: prompts a batch, or of each task by its title. Keep it the same in everything that is compared: bf16
            answers depend on it.
        positions: tokens that a prompt and its answer may have; None: as many as the model can attend to.
        share: this rank's share where several ranks, each with the whole model, ask the same; all of them get all
            results, and they are the same as one rank's.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[LoadedTask]
    batch_size: int | Mapping[str, int]
    positions: int | None = None
    share: BatchSharding = field(default_factory=BatchSharding)


def score_model(
    model: PreTrainedModel,
    request: ScoreRequest,
    *,
    on_start: Callable[[LoadedTask], None] = lambda task: None,
    on_result: Callable[[TaskResult], None] = lambda result: None,
) -> dict[str, TaskResult]:
    """Ask a model every item of every task, greedily, and grade the answers.

    Args:
        model: a causal language model, where it is to answer; each of its modules is in the mode (train or eval)
            afterwards that it was in.
        on_start: called before each task.
        on_result: called after each task.

    Returns:
        A result for each title, in the tasks' order.

    Raises:
        UserError: the packages of the extra `eval` are missing.
        DataError: no item of a task fits into the model's positions.

    Example:
        >>> results = score_model(model, ScoreRequest(tokenizer, load_tasks(tasks), batch_size=8))
        >>> results["law"].raw
        0.42
    """
    ifeval.require_harness()
    tokenizer, share = request.tokenizer, request.share
    positions = request.positions or max_positions(model.config)
    with quiet_harness(), _as_it_was(model):
        from cofitune.evaluation.harness.model import ChatTemplateLM, ChatTemplateLMBase

        def answerer(task: EvalTask, size: int, asked: Sequence[Asked] | None) -> ChatTemplateLMBase:
            shared = (model, tokenizer, size, share, positions)
            if asked is None:
                return ChatTemplateLMBase(*shared, think_end_token=task.think_end_token)
            return ChatTemplateLM(*shared, think_end_token=task.think_end_token, asked=asked)

        def drift(task: LoadedTask, size: int) -> TaskResult:
            return score_drift(model, tokenizer, task, size, share)

        return _score_tasks(request, positions, answerer, drift, on_start, on_result)


def score_with_vllm(
    model: LLM,
    request: ScoreRequest,
    ends: Sequence[int],
    *,
    on_start: Callable[[LoadedTask], None] = lambda task: None,
    on_result: Callable[[TaskResult], None] = lambda result: None,
) -> dict[str, TaskResult]:
    """Ask a model in vLLM, as `score_model` asks one in memory; `batch_size` is how many items it is given at once.

    Args:
        model: from `cofitune.model.vllm_engine.vllm_model`, with room for the longest item and `VLLM_ROOM` more.
        request: without tasks of drift, which compares with what transformers computed.
        ends: tokens that end an answer.

    Returns, Raises:
        As `score_model`.
    """
    ifeval.require_harness()
    with quiet_harness():
        from cofitune.evaluation.harness.vllm_model import VllmLM, VllmLMBase

        def answerer(task: EvalTask, size: int, asked: Sequence[Asked] | None) -> VllmLMBase:
            shared = (model, request.tokenizer, size, request.share)
            if asked is None:
                return VllmLMBase(*shared, think_end_token=task.think_end_token)
            return VllmLM(*shared, think_end_token=task.think_end_token, asked=asked, ends=ends)

        def drift(task: LoadedTask, size: int) -> TaskResult:
            raise RuntimeError(f"{task.task.title}: drift is not measured with vLLM")

        return _score_tasks(request, request.positions, answerer, drift, on_start, on_result)


def _score_tasks(
    request: ScoreRequest,
    positions: int | None,
    answerer: Answerer,
    drift: Callable[[LoadedTask, int], TaskResult],
    on_start: Callable[[LoadedTask], None],
    on_result: Callable[[TaskResult], None],
) -> dict[str, TaskResult]:
    results = {}
    for task in fit_lengths(request.tasks, request.tokenizer, positions):
        on_start(task)
        size = request.batch_size if isinstance(request.batch_size, int) else request.batch_size[task.task.title]
        if task.rehearsal is not None:
            result = drift(task, size)
        elif task.harness:
            result = score_harness(answerer(task.task, size, None), task)
        else:
            asked = [ask_item(request.tokenizer, item, task.task) for item in task.items]
            result = _score_task(answerer(task.task, size, asked), task, asked)
        results[task.task.title] = result
        on_result(result)
    return results


def versions() -> dict[str, str]:
    """Versions of what asks and grades: the harness, its metrics' packages, and a hash of our own code for it.

    Raises:
        UserError: a package is not installed.
    """
    ifeval.require_harness()
    own = hashlib.sha256()
    for path in own_code():
        own.update(path.read_bytes())
    names = (name.replace("_", "-") for name in ifeval.PACKAGES)
    return {name: metadata.version(name) for name in names} | {"own_code": own.hexdigest()}


def own_code() -> list[Path]:
    """The files of cofitune that answer and grade: rooms as a whole, since which of their files matter changes."""
    package = Path(__file__).parents[1]
    rooms = [path for name in OWN_CODE for path in (package / name).rglob("*.py")]
    return sorted(rooms + [package / name for name in OWN_CODE if name.endswith(".py")])


def _score_task(judge: LM, loaded: LoadedTask, asked: Sequence[Asked]) -> TaskResult:
    """Score one task; `asked` are its items as the model sees them."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    start = time.monotonic()
    task = loaded.task
    # `evaluate` and not `simple_evaluate`: the latter seeds every global generator (a search trains between two
    # evaluations) and runs `pip list` for its report
    result = evaluate(
        lm=judge,
        task_dict={"tasks": {"task": ConfigurableTask(config=_task_config(loaded, asked))}, "groups": {}},
        bootstrap_iters=0,
    )
    by_index = {sample["doc_id"]: sample for sample in result["samples"]["task"]}
    samples = tuple(_sample(loaded, item, by_index[index]) for index, item in enumerate(loaded.items))
    return TaskResult(
        title=task.title,
        category=task.category,
        metric=loaded.metric,
        raw=float(result["results"]["task"][f"{METRIC},none"]),
        chance=loaded.chance,
        samples=samples,
        seconds=time.monotonic() - start,
        others=_others(loaded, samples, asked),
    )


def _task_config(loaded: LoadedTask, asked: Sequence[Asked]) -> dict[str, object]:
    """The task as the harness describes tasks; its rows are indices into our items, so no dataset cache is involved."""
    from datasets import Dataset

    task, items = loaded.task, loaded.items
    rows = Dataset.from_list([{"index": i} for i in range(len(items))])

    config: dict[str, object] = {
        "task": "task",
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",  # what the template writes is all that stands between question and answer
        "doc_to_text": lambda row: asked[row["index"]].prompt,
        "process_results": lambda row, result: {
            METRIC: _grade(loaded, items[row["index"]], result, asked[row["index"]])
        },
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    if task.kind == "multiple_choice":
        return config | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: list(asked[row["index"]].texts),
            "doc_to_target": lambda row: items[row["index"]].answer,
        }
    if task.kind == "loss":
        return config | {"output_type": "loglikelihood", "doc_to_target": lambda row: asked[row["index"]].texts[0]}
    return config | {
        "output_type": "generate_until",
        "doc_to_target": lambda row: "",
        "generation_kwargs": {"until": list(task.stop), "max_gen_toks": task.max_new_tokens, "do_sample": False},
    }


def _grade(loaded: LoadedTask, item: EvalItem, answers: Sequence[Any], asked: Asked) -> float | int:
    task = loaded.task
    if task.kind == "multiple_choice":
        return int(metrics.pick([value for value, _ in answers], item.choices, task.metric) == item.answer)
    if task.kind == "loss":
        return -float(answers[0][0]) / _size(asked, task.metric)
    if task.kind == "ifeval":
        return int(ifeval.follows_instructions(item.checks or {}, answers[0]))
    score = metrics.text_score(task.metric, answers[0], item.references, task.pattern, task.tokenize)
    return int(score) if loaded.metric.binary else score


def _size(asked: Asked, metric: str) -> int:
    """Over what a reference's cross-entropy is counted: its UTF-8 bytes as asked, or its tokens behind the prompt."""
    return len(asked.texts[0].encode("utf-8")) if metric == "nats_per_byte" else len(asked.answers[0].ids)


def _others(loaded: LoadedTask, samples: Sequence[Sample], asked: Sequence[Asked]) -> dict[str, float]:
    """Further figures of a task: the other metric of the same log-likelihoods, BLEU and chrF as papers report them."""
    task, items = loaded.task, loaded.items
    if task.kind == "multiple_choice":
        other = "acc" if task.metric == "acc_norm" else "acc_norm"
        picks = [metrics.pick(s.log_likelihoods or (), i.choices, other) for s, i in zip(samples, items, strict=True)]
        return {other: sum(p == i.answer for p, i in zip(picks, items, strict=True)) / len(items)}
    if task.kind == "loss":
        nats = -sum((s.log_likelihoods or (0.0,))[0] for s in samples)
        sizes = {name: sum(_size(one, name) for one in asked) for name in LOSS_METRICS}
        return {f"corpus_{name}": nats / size for name, size in sizes.items()}
    if task.kind == "generate":
        results = [metrics.extract(s.answer or "", task.pattern) or "" for s in samples]
        whole = metrics.corpus_score(task.metric, results, [i.references for i in items], task.tokenize)
        return {} if whole is None else {f"corpus_{task.metric}": whole}
    return {}


def _sample(loaded: LoadedTask, item: EvalItem, results: dict[str, Any]) -> Sample:
    answers = results["filtered_resps"]
    prompt = str(results["arguments"][0][0])
    if loaded.task.kind in ("multiple_choice", "loss"):
        values = tuple(float(value) for value, _ in answers)
        chosen = metrics.pick(values, item.choices, loaded.task.metric) if item.choices else None
        return Sample(item.line, prompt, item.reference, None, values, chosen, results[METRIC])
    return Sample(item.line, prompt, item.reference, answers[0], None, None, results[METRIC])


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Give each module its mode back: the harness calls `eval()`, and a training after it would lose its dropout."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
