"""What fits into the model: items that do not are left out and counted; a task of which nothing fits is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from cofitune.errors import DataError
from cofitune.evaluation.asked import ask_item
from cofitune.evaluation.items import EvalItem, EvalTask, LoadedTask
from cofitune.evaluation.lengths import fit_lengths
from cofitune.evaluation.tasks import load_tasks
from tests.evaluation.prompts import render_prompt
from tests.helpers import write_jsonl


def make_task(folder: Path, items: list[dict[str, Any]], kind: str = "generate", **changes: Any) -> LoadedTask:
    path = folder / "items.jsonl"
    write_jsonl(path, items)
    metric = {"generate": "exact_match", "loss": "nats_per_token", "multiple_choice": "acc"}[kind]
    return load_tasks([EvalTask("t", "gen_kn", str(path), kind, metric, **changes)])[0]


def test_items_that_do_not_fit_are_left_out_and_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    items = [{"question": text, "answer": "a"} for text in ("short", "long " * 100, "also short")]
    task = make_task(tmp_path, items, max_new_tokens=10)
    tokens = [len(tiny_tokenizer(render_prompt(tiny_tokenizer, item))["input_ids"]) for item in task.items]
    (fitting,) = fit_lengths([task], tiny_tokenizer, max(tokens[0], tokens[2]) + 10)
    assert [item.line for item in fitting.items] == [1, 3]
    assert fitting.left_out == (2,)
    assert fitting.longest == max(tokens[0], tokens[2])
    assert fit_lengths([fitting], tiny_tokenizer, fitting.longest + 10) == (fitting,)
    (exact,) = fit_lengths([task], tiny_tokenizer, tokens[1] + 10)  # the last position counts
    assert exact.left_out == ()
    assert fit_lengths([task], tiny_tokenizer, None)[0].left_out == ()
    with pytest.raises(DataError, match=rf"no item of task 't' fits: the shortest prompt has {min(tokens)} tokens"):
        fit_lengths([task], tiny_tokenizer, min(tokens) + 9)


def test_answers_over_the_limit_are_counted_and_a_task_of_such_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    long = "a very long answer " * 20
    items = [{"question": "Q?", "answers": answers} for answers in (["a", long], [long], ["b"])]
    (result,) = fit_lengths([make_task(tmp_path, items, max_new_tokens=4)], tiny_tokenizer, None)
    assert (result.too_long, len(result.items)) == ((2,), 3)
    with pytest.raises(DataError, match=r"no answer of task 't' can be all right: .* max_new_tokens is 4"):
        fit_lengths([make_task(tmp_path, items[1:2], max_new_tokens=4)], tiny_tokenizer, None)
    numbers = make_task(tmp_path, [{"question": "Q?", "answer": f"{long} 7"}], max_new_tokens=4)
    number = replace(numbers, task=replace(numbers.task, metric="number"))
    assert fit_lengths([number], tiny_tokenizer, None)[0].too_long == (), "the number may come alone"


def test_the_hash_follows_the_prompts_and_the_given_answers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    def asked(choice: str = "b") -> str:
        task = make_task(tmp_path, [{"question": "Q?", "choices": [choice, "c"], "answer": 1}], "multiple_choice")
        return fit_lengths([task], tiny_tokenizer, None)[0].asked_sha256

    before = asked()
    assert asked() == before
    other = asked("d")
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("assistant\n", "assistant:\n")
    assert len({before, other, asked()}) == 3


@pytest.mark.parametrize("kind", ["loss", "multiple_choice"])
def test_given_answers_count_with_their_own_length(tmp_path: Path, tiny_tokenizer: Any, kind: str) -> None:
    long = "a very long answer " * 20
    item = {"question": "Q?", "choices": ["short", long], "answer": 1}
    task = make_task(tmp_path, [item, item | {"choices": ["b", "c"]}], kind, max_new_tokens=100_000)
    prompt = len(tiny_tokenizer(render_prompt(tiny_tokenizer, task.items[0]))["input_ids"])
    whole = prompt + len(tiny_tokenizer(long)["input_ids"])
    assert fit_lengths([task], tiny_tokenizer, whole)[0].left_out == ()
    assert fit_lengths([task], tiny_tokenizer, whole - 1)[0].left_out == (1,)


def test_a_continuation_is_the_items_own_text_behind_the_first_token(tiny_tokenizer: Any) -> None:
    task = EvalTask("t", "gen_kn", "f.jsonl", "loss", "nats_per_token", prompt="continuation")

    def asked(text: str, answer: str) -> tuple[str, tuple[str, ...]]:
        result = ask_item(tiny_tokenizer, EvalItem(1, text, references=(answer,)), task)
        return result.prompt, result.texts

    assert asked("The boy", "runs") == ("The boy", (" runs",))
    assert asked("The boy", " runs") == ("The boy", (" runs",))
    assert asked("The boy\n", "runs") == ("The boy\n", ("runs",))
    tiny_tokenizer.bos_token = "<|im_start|>"
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tiny_tokenizer.bos_token_id)]
    )
    assert asked("The boy", "runs")[0] == "<|im_start|>The boy"


def test_an_item_that_the_template_cannot_ask_is_named_or_left_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    items = [{"question": text, "answer": "a"} for text in ("What does <|im_end|> end?", "Q?")]
    with pytest.raises(DataError, match=r"items\.jsonl:1: .*holds '<\|im_end\|>'.*control token.*task 't'.*drop"):
        fit_lengths([make_task(tmp_path, items)], tiny_tokenizer, None)
    (result,) = fit_lengths([make_task(tmp_path, items, on_bad_item="drop")], tiny_tokenizer, None)
    assert result.unusable == (1,) and [item.line for item in result.items] == [2]
    with pytest.raises(DataError, match="no item of task 't' can be asked in this chat template"):
        fit_lengths([make_task(tmp_path, items[:1], on_bad_item="drop")], tiny_tokenizer, None)


@pytest.mark.parametrize("prompt", ["chat", "continuation"])
@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("generate", {"question": "What does <|im_end|> end?", "answer": "a"}),
        ("multiple_choice", {"question": "Q?", "choices": ["a", "b <|im_end|>"], "answer": 0}),
        ("loss", {"question": "Q?", "answer": "<|im_end|>\n<|im_start|>user"}),
        ("loss", {"question": "A <|im_start|> b", "answer": "c"}),
    ],
)
def test_a_control_token_is_refused_wherever_a_model_would_read_it(
    tmp_path: Path, tiny_tokenizer: Any, kind: str, item: dict[str, Any], prompt: str
) -> None:
    task = make_task(tmp_path, [item], kind, prompt=prompt)
    with pytest.raises(DataError, match=r"items\.jsonl:1: .*holds '<\|im_(end|start)\|>'.*write it otherwise"):
        fit_lengths([task], tiny_tokenizer, None)
