"""Ask a model the tasks of lm-evaluation-harness exactly as the harness's own command line does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cofitune.data.guarded import guarded
from cofitune.errors import UserError
from cofitune.evaluation.harness.quiet import quiet_harness
from cofitune.evaluation.harness.tasks import FEWSHOT_SEED
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.samples import Sample, TaskResult

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

MAX_GEN_TOKS = 256  # the harness's own limit where a task names none


def reseed(one: Task) -> None:
    """Let a task draw its few-shot examples from the start: each build of its requests must draw alike."""
    one.set_fewshot_seed(seed=FEWSHOT_SEED)


def render(
    tokenizer: PreTrainedTokenizerBase, history: list[dict[str, str]], add_generation_prompt: bool, what: str
) -> str:
    """A prompt of the harness inside the chat template.

    Args:
        what: is asked, for the message.

    Raises:
        UserError: the template refuses it.
    """
    try:
        return str(
            guarded(
                lambda: tokenizer.apply_chat_template(
                    history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        )
    except TemplateError as error:
        raise UserError(f"{what}: the model's chat template refuses a prompt: {error}") from error


def build_requests(loaded: LoadedTask, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str, str | int]]:
    """What the model will be asked: an item's number, the context, and the continuation or the tokens it may have."""

    def template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render(tokenizer, history, add_generation_prompt, f"task '{loaded.task.title}'")

    in_template, before = loaded.task.apply_chat_template, 0
    with quiet_harness():
        for one in loaded.harness:
            reseed(one)
            one.build_all_requests(
                limit=loaded.task.limit,
                apply_chat_template=in_template,
                fewshot_as_multiturn=in_template,
                chat_template=template if in_template else None,
            )
            for request in one.instances:
                context, answer = request.args if len(request.args) == 2 else ("", request.args[0])
                length = answer.get("max_gen_toks", MAX_GEN_TOKS) if isinstance(answer, dict) else str(answer)
                yield before + request.doc_id + 1, str(context), length
            before += len({request.doc_id for request in one.instances})


def score_harness(judge: LM, loaded: LoadedTask) -> TaskResult:
    """Score one task, or the tasks of a group as one whose items are all of theirs."""
    from lm_eval.evaluator import evaluate

    start = time.monotonic()
    task, (name, _, filter_) = loaded.task, loaded.metric.name.partition(",")
    samples: list[Sample] = []
    figures = {}
    for one in loaded.harness:
        reseed(one)
        result = evaluate(
            lm=judge,
            task_dict={"tasks": {one.task_name: one}, "groups": {}},
            limit=task.limit,
            apply_chat_template=task.apply_chat_template,
            fewshot_as_multiturn=task.apply_chat_template,
            bootstrap_iters=0,
        )
        figures = result["results"][one.task_name]
        mine = [s for s in result["samples"][one.task_name] if s["filter"] == (filter_ or one._filters[0].name)]
        mine.sort(key=lambda s: s["doc_id"])
        samples += [_sample(s, name, len(samples) + 1 + i) for i, s in enumerate(mine)]
    numbers = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
    own = f"{name},{filter_ or loaded.harness[0]._filters[0].name}"
    alone = len(loaded.harness) == 1  # a group's figure is the mean over all items, whichever task they are of
    return TaskResult(
        title=task.title,
        category=task.category,
        metric=loaded.metric,
        raw=numbers[own] if alone else sum(s.score for s in samples) / len(samples),
        chance=loaded.chance,
        samples=tuple(samples),
        seconds=time.monotonic() - start,
        others={key.removesuffix(",none"): v for key, v in numbers.items() if key != own and "," in key}
        if alone
        else {},
    )


def _sample(results: dict[str, Any], metric: str, line: int) -> Sample:
    answers = results["filtered_resps"]
    chosen = isinstance(answers[0], tuple | list) and not isinstance(answers[0][0], str)
    return Sample(
        line=line,
        prompt=str(results["arguments"][0][0]),
        reference=results["target"],
        answer=None if chosen else str(answers[0]),
        log_likelihoods=tuple(float(value) for value, _ in answers) if chosen else None,
        pick=None,
        score=float(results[metric]),
    )
