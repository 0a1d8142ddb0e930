"""A model in vLLM is asked what the same model is asked in transformers, and its answers are read alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cofitune.data.chat import end_ids, set_template
from cofitune.evaluation.data_parallel import BatchSharding
from cofitune.evaluation.harness.model import ChatTemplateLMBase
from cofitune.evaluation.harness.vllm_model import VllmLMBase
from cofitune.evaluation.items import EvalTask, LoadedTask
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import VLLM_ROOM, ScoreRequest, score_model, score_with_vllm
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.load import load_model, load_tokenizer
from tests.helpers import write_jsonl
from tests.vllm_stand_in import LLM, vllm_stand_in

__all__ = ["vllm_stand_in"]

QUESTIONS: list[dict[str, Any]] = [
    {"question": "Two plus two?", "choices": ["four", "three of them", "Paris"], "answer": 0},
    {"question": "Name the capital of France, please.", "choices": ["world", "Paris is the capital"], "answer": 1},
    {"question": "What may a tenant do?", "choices": ["e", "a", "x", "end the lease; the landlord"], "answer": 3},
]
OPEN = [{"instruction": p, "answer": "the court"} for p in ("Hello world.", "The court held that the contract", "a")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The tiny model with weights large enough that its choices are no coin flips."""
    to = tmp_path_factory.mktemp("loud") / "model"
    model = load_model(str(tiny_model_folder), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    model.save_pretrained(to)
    load_tokenizer(str(tiny_model_folder)).save_pretrained(to)
    return to


def both(folder: Path, task: LoadedTask, length: int | None = None) -> tuple[TaskResult, TaskResult, LLM]:
    """What transformers and vLLM's stand-in answer, and the stand-in."""
    tokenizer = load_tokenizer(str(folder))
    set_template(tokenizer, "auto")
    model, engine = load_model(str(folder), torch.float32), LLM(model=folder, max_model_len=length)
    request = ScoreRequest(tokenizer, [task], 2, None if length is None else length - 1)
    ends = sorted(end_ids(tokenizer, model.generation_config))
    first = score_model(model, request)[task.task.title]
    return first, score_with_vllm(engine, request, ends)[task.task.title], engine


def task(folder: Path, items: list[dict[str, Any]], kind: str, metric: str, **changes: Any) -> LoadedTask:
    write_jsonl(folder / "items.jsonl", items)
    fields = {"title": "t", "category": "gen_kn", "path": str(folder / "items.jsonl"), "kind": kind, "metric": metric}
    return load_tasks([EvalTask(**fields | changes)])[0]


def check_alike(one: TaskResult, other: TaskResult) -> None:
    assert one.raw == pytest.approx(other.raw, abs=1e-5) and len(one.samples) == len(other.samples) > 0
    for a, b in zip(one.samples, other.samples, strict=True):
        assert (a.line, a.prompt, a.answer, a.pick) == (b.line, b.prompt, b.answer, b.pick)
        assert (a.log_likelihoods or ()) == pytest.approx(b.log_likelihoods or (), rel=1e-5)


@pytest.mark.usefixtures("vllm_stand_in")
@pytest.mark.parametrize("prompt", ["chat", "continuation"])
@pytest.mark.parametrize("kind", ["multiple_choice", "loss"])
def test_log_likelihoods_are_those_of_transformers(tmp_path: Path, folder: Path, kind: str, prompt: str) -> None:
    items, metric = (QUESTIONS, "acc_norm") if kind == "multiple_choice" else (OPEN, "nats_per_token")
    first, second, engine = both(folder, task(tmp_path, items, kind, metric, prompt=prompt))
    check_alike(first, second)
    assert {own.prompt_logprobs for _, own in engine.asked} == {1}


@pytest.mark.usefixtures("vllm_stand_in")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stop": ("e",)},
        {"stop": ("<|im_start|>", "the")},
        {"think_end_token": " "},
        {"think_end_token": "<|im_start|>", "stop": ("e",)},
    ],
)
def test_answers_end_where_those_of_transformers_do(tmp_path: Path, folder: Path, changes: dict[str, Any]) -> None:
    asked = task(tmp_path, OPEN, "generate", "exact_match", **{"max_new_tokens": 12, "stop": ()} | changes)
    first, second, engine = both(folder, asked)
    check_alike(first, second)
    assert any(sample.answer for sample in second.samples)
    for _, own in engine.asked:
        assert own.max_tokens == 12 and own.temperature == 0
        # a string inside the reasoning ends nothing, and special tokens are never seen as text
        plain = [s for s in asked.task.stop if not s.startswith("<|")] if asked.task.think_end_token is None else []
        assert own.stop == plain and own.detokenize is bool(plain)


@pytest.mark.usefixtures("vllm_stand_in")
def test_the_longest_item_fits_into_the_room_that_is_asked_for(tmp_path: Path, folder: Path) -> None:
    items = [QUESTIONS[1] | {"question": "word " * 60}, QUESTIONS[0]]
    asked = task(tmp_path, items, "multiple_choice", "acc")
    longest = max(len(ids) for ids, _ in both(folder, asked)[2].asked)
    first, second, engine = both(folder, asked, longest + VLLM_ROOM)
    check_alike(first, second)
    assert max(len(ids) for ids, _ in engine.asked) == longest, "nothing is cut"


@pytest.mark.usefixtures("vllm_stand_in")
@pytest.mark.parametrize("in_template", [False, True])
def test_the_harness_own_tasks_are_asked_as_with_transformers(tmp_path: Path, folder: Path, in_template: bool) -> None:
    rows = [
        {"id": str(i), "question": q["question"], "choices": {"text": q["choices"], "label": list("ABCD")}}
        | {"answerKey": "A"}
        for i, q in enumerate(QUESTIONS)
    ]
    sums = [{"question": f"{n} + 2?", "answer": f"So it is {n + 2}.\n#### {n + 2}"} for n in (2, 5)]
    for name, own, split in (("arc_easy", rows, "test"), ("gsm8k", sums, "test")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / f"{split}.jsonl", own)
        write_jsonl(tmp_path / name / "train.jsonl", own)
    for name, metric, few in (("arc_easy", "acc_norm", 1), ("gsm8k", "exact_match,flexible-extract", 0)):
        path = str(tmp_path / name)
        given = EvalTask(name, "gen_kn", path, "harness", metric, harness=name, num_fewshot=few)
        (loaded,) = load_tasks([EvalTask(**vars(given) | {"apply_chat_template": in_template})])
        first, second, _ = both(folder, loaded)
        check_alike(first, second)


@pytest.mark.usefixtures("vllm_stand_in")
def test_whole_texts_are_read_in_windows_where_they_are_long(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    texts: list[Any] = [SimpleNamespace(args=(text,)) for text in ("The court held that", "word " * 40)]
    model, engine = load_model(str(folder), torch.float32), LLM(model=folder, max_model_len=34)
    own = VllmLMBase(engine, tokenizer, 2, BatchSharding()).loglikelihood_rolling(texts)
    # of vLLM's positions one is for the token that it generates, and one for what a window stands behind
    theirs = ChatTemplateLMBase(model, tokenizer, 2, BatchSharding(), positions=32).loglikelihood_rolling(texts)
    assert own == pytest.approx(theirs, abs=1e-3)
