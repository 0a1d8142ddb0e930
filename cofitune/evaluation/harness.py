"""Score a model in memory on tasks of ours through lm-evaluation-harness (EleutherAI, MIT), one task at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cofitune.data.chat import render
from cofitune.errors import DataError
from cofitune.evaluation import grade
from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.evaluation.tasks import EvalItem, LoadedTask

METRIC = "score"  # our name for a task's one metric inside the harness


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[LoadedTask],
    batch_size: int,
    device: torch.device | str | None = None,
    on_start: Callable[[LoadedTask], None] | None = None,
    on_result: Callable[[TaskResult], None] | None = None,
) -> dict[str, TaskResult]:
    """Ask a model every item of every task, greedily, and grade the answers.

    Args:
        model: a causal language model; each of its modules is in the mode (train or eval) afterwards that it was in.
        tokenizer: with the template set by `cofitune.data.chat.set_template`, and a padding token.
        tasks: from `cofitune.evaluation.tasks.load_tasks`.
        batch_size: prompts a batch. Keep it the same in everything that is compared: bf16 answers depend on it.
        device: where to move the model first; None: it stays where it is.
        on_start: called before each task.
        on_result: called after each task.

    Returns:
        A result for each title, in the tasks' order.

    Raises:
        UserError: the packages of the extra `eval` are missing.
        DataError: an item does not fit into the model's positions.
    """
    grade.require_harness()
    check_lengths(tasks, tokenizer, max_positions(model.config))
    if device is not None:
        model.to(device)
    results = {}
    with _quiet(), _as_it_was(model):
        from cofitune.evaluation.judge import Judge

        judge = Judge(model, tokenizer, batch_size)
        for task in tasks:
            if on_start is not None:
                on_start(task)
            results[task.task.title] = result = _score_task(judge, task)
            if on_result is not None:
                on_result(result)
    return results


def render_prompt(tokenizer: PreTrainedTokenizerBase, item: EvalItem) -> str:
    """The text that the model sees for an item, up to where its answer begins."""
    return render(tokenizer, [{"role": "user", "content": item.prompt}], add_generation_prompt=True)


def check_lengths(
    tasks: Sequence[LoadedTask], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> dict[str, int]:
    """Longest prompt of each task, in tokens, template included.

    Raises:
        DataError: a prompt and its answer need more tokens than the model has positions: the harness would cut the
            prompt from the left, template and instruction first (file:line).
    """
    longest = {}
    for loaded in tasks:
        lengths = []
        for item in loaded.items:
            prompt = render_prompt(tokenizer, item)
            lengths.append(_num_tokens(tokenizer, prompt))
            wanted = loaded.task.max_new_tokens
            if item.choices:
                wanted = max(_num_tokens(tokenizer, choice) for choice in item.choices)
            if positions is not None and lengths[-1] + wanted > positions:
                raise DataError(
                    f"{loaded.task.path}:{item.line}: the prompt has {lengths[-1]} tokens and the answer may have "
                    f"{wanted}, but the model has {positions} positions (task '{loaded.task.title}')"
                )
        longest[loaded.task.title] = max(lengths)
    return longest


def max_positions(config: Any) -> int | None:
    """Tokens that a model can attend to, by its configuration; None where it does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if positions else None


def harness_version() -> str:
    """Version of lm-evaluation-harness.

    Raises:
        UserError: it is not installed.
    """
    grade.require_harness()
    return metadata.version("lm-eval")


def _score_task(judge: Any, loaded: LoadedTask) -> TaskResult:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    start = time.monotonic()
    # `evaluate` and not `simple_evaluate`: the latter seeds every global generator (a search trains between two
    # evaluations) and runs `pip list` for its report
    found = evaluate(
        lm=judge,
        task_dict={"tasks": {"task": ConfigurableTask(config=_task_config(loaded))}, "groups": {}},
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    by_index = {sample["doc_id"]: sample for sample in found["samples"]["task"]}
    samples = tuple(_sample(loaded, item, by_index[index]) for index, item in enumerate(loaded.items))
    task = loaded.task
    return TaskResult(
        title=task.title,
        category=task.category,
        metric=METRICS[task.metric],
        raw=float(found["results"]["task"][f"{METRIC},none"]),
        chance=loaded.chance,
        samples=samples,
        seconds=time.monotonic() - start,
    )


def _task_config(loaded: LoadedTask) -> dict[str, Any]:
    """The task as the harness describes tasks; its rows are indices into our items, so no dataset cache is involved."""
    from datasets import Dataset

    task, items = loaded.task, loaded.items
    rows = Dataset.from_list([{"index": i} for i in range(len(items))])
    config: dict[str, Any] = {
        "task": "task",
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",  # the template's own line break is all that stands between question and answer
        "doc_to_text": lambda row: items[row["index"]].prompt,
        "process_results": lambda row, answers: {METRIC: _grade(loaded, items[row["index"]], answers)},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    if task.kind == "multiple_choice":
        return config | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: list(items[row["index"]].choices),
            "doc_to_target": lambda row: items[row["index"]].answer,
        }
    return config | {
        "output_type": "generate_until",
        "doc_to_target": lambda row: "",
        "generation_kwargs": {"until": list(task.stop), "max_gen_toks": task.max_new_tokens, "do_sample": False},
    }


def _grade(loaded: LoadedTask, item: EvalItem, answers: Sequence[Any]) -> int:
    task = loaded.task
    if task.kind == "multiple_choice":
        return int(grade.pick([value for value, _ in answers], item.choices, task.metric) == item.answer)
    if task.kind == "ifeval":
        return int(grade.follows_instructions(item.checks or {}, answers[0]))
    if task.metric == "regex":
        return int(grade.regex_match(answers[0], item.references, task.pattern or ""))
    return int(grade.exact_match(answers[0], item.references))


def _sample(loaded: LoadedTask, item: EvalItem, found: dict[str, Any]) -> Sample:
    answers = found["filtered_resps"]
    prompt = str(found["arguments"][0][0])
    if loaded.task.kind == "multiple_choice":
        values = tuple(float(value) for value, _ in answers)
        chosen = grade.pick(values, item.choices, loaded.task.metric)
        return Sample(item.line, prompt, item.reference, None, values, chosen, found[METRIC])
    return Sample(item.line, prompt, item.reference, answers[0], None, None, found[METRIC])


def _num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Give each module its mode back: the harness calls `eval()`, and a trainer that goes on would lose its dropout."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the harness's log lines, its progress bars and transformers' remarks on generation."""
    from lm_eval.api import task as harness_task

    harness_log = logging.getLogger("lm_eval")
    level, verbosity, bars = harness_log.level, transformers_logging.get_verbosity(), harness_task.tqdm
    harness_log.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    harness_task.tqdm = partial(bars, disable=True)
    try:
        yield
    finally:
        harness_log.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        harness_task.tqdm = bars
