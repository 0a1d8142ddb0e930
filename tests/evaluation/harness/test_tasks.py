"""The harness's own tasks: the figures of its command line, digit for digit, and what is told before weights load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cofitune.data.chat import set_template
from cofitune.errors import DataError, UserError
from cofitune.evaluation.harness import tasks as harness_tasks
from cofitune.evaluation.harness.task_index import task_index
from cofitune.evaluation.harness.tasks import write_task_files
from cofitune.evaluation.items import EvalTask, LoadedTask
from cofitune.evaluation.lengths import fit_lengths
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import ScoreRequest, score_model
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.load import load_model, load_tokenizer
from cofitune.ranks import VARIABLES
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

ARC = [
    ("Who pays the court?", ["the buyer", "the seller", "a tenant"], "A"),
    ("What is two plus two?", ["four", "three", "two", "Paris"], "1"),
    ("Name the capital of France.", ["hello", "Paris", "court"], "B"),
    ("What may end the lease?", ["a notice", "a world", "the contract held by the seller"], "C"),
    ("Is it void?", ["yes it is", "no"], "A"),
]
BOOLQ = [
    ("The contract was void.", "is the contract void", 1),
    ("The landlord needs a reason.", "does he need none", 0),
]
SUMS = [("2 + 2?", 4), ("A tenant pays 3 and then 4. How much?", 7), ("What is 10 times 120?", 1200)]


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / f"{split}.jsonl", rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three data sets with the fields that the harness's tasks read."""
    arc = [
        {
            "id": str(i),
            "question": question,
            "choices": {"text": choices, "label": list("1234" if key.isdigit() else "ABCD")[: len(choices)]},
            "answerKey": key,
        }
        for i, (question, choices, key) in enumerate(ARC)
    ]
    boolq = [{"passage": p, "question": q, "label": label} for p, q, label in BOOLQ * 2]
    sums = [{"question": q, "answer": f"So it is {a}.\n#### {a}"} for q, a in SUMS]
    for name, rows, split in (("arc_easy", arc, "test"), ("boolq", boolq, "validation"), ("gsm8k", sums, "test")):
        write(tmp_path / "data" / name, split, rows)
        write(tmp_path / "data" / name, "train", rows[::-1])
    return tmp_path / "data"


@pytest.fixture
def loud_model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with weights large enough that its choices are no coin flips, as a folder."""
    model = load_model(str(tiny_model_folder), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(tiny_model_folder)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def harness_task(data: Path, name: str, metric: str = "", **changes: Any) -> EvalTask:
    return EvalTask(name, "gen_kn", str(data / name), "harness", metric, harness=name, **changes)


def command_line(model: Path, tasks: list[EvalTask], folder: Path, *options: str) -> tuple[Any, dict[str, Any]]:
    """What `lm_eval run` reports and logs of these tasks."""
    for task in tasks:
        (folder / "include" / task.title).mkdir(parents=True)
        write_task_files(task, folder / "include" / task.title)
    names = ",".join(str(task.harness) for task in tasks)
    settings = f"--model hf --model_args pretrained={model},dtype=float32 --device cpu --batch_size 2 --tasks {names}"
    places = f"--include_path {folder}/include --output_path {folder}/out --log_samples"
    command = [sys.executable, "-m", "lm_eval", "run", *settings.split(), *places.split(), *options]
    alone = {name: value for name, value in os.environ.items() if name not in VARIABLES}  # of whom no test made a rank
    subprocess.run(command, check=True, capture_output=True, env=alone)
    (report,) = (folder / "out").rglob("results_*.json")
    logged = {
        task.title: [json.loads(line) for line in next(report.parent.glob(f"samples_{task.harness}_*")).open()]
        for task in tasks
    }
    return json.loads(report.read_text())["results"], logged


def short_answers(loaded: LoadedTask, tokens: int = 24) -> LoadedTask:
    for one in loaded.harness:
        one.set_config("generation_kwargs", {"max_gen_toks": tokens}, update=True)
    return loaded


def ask(model: Path, *tasks: LoadedTask, **options: Any) -> dict[str, TaskResult]:
    tokenizer = load_tokenizer(str(model))
    set_template(tokenizer, "auto")
    return score_model(load_model(str(model), torch.float32), ScoreRequest(tokenizer, tasks, 2, **options))


def test_three_tasks_score_as_the_harness_command_line_to_the_digit(
    data: Path, loud_model: Path, tmp_path: Path
) -> None:
    names = {"arc_easy": "acc_norm", "boolq": "acc", "gsm8k": "exact_match,flexible-extract"}
    tasks = [harness_task(data, name, metric, num_fewshot=1) for name, metric in names.items()]
    options = ["--num_fewshot", "1", "--gen_kwargs", "max_gen_toks=24"]
    figures, logged = command_line(loud_model, tasks, tmp_path, *options)
    arc, boolq, sums = load_tasks(tasks)
    results = ask(loud_model, arc, boolq, short_answers(sums))
    for name, metric in names.items():
        full = metric if "," in metric else f"{metric},none"
        theirs = sorted((s for s in logged[name] if s["filter"] == full.split(",")[1]), key=lambda s: s["doc_id"])
        assert results[name].raw == figures[name][full]
        assert len(results[name].samples) == len(theirs)
        for ours, their in zip(results[name].samples, theirs, strict=True):
            assert ours.score == their[metric.split(",")[0]]
            assert ours.prompt == their["arguments"]["gen_args_0"]["arg_0"]
            if ours.log_likelihoods is None:
                assert [ours.answer] == their["filtered_resps"]
            else:  # the harness logs numbers as text
                assert [str(v) for v in ours.log_likelihoods] == [result[0] for result in their["filtered_resps"]]
        for other, value in results[name].others.items():
            assert value == figures[name][other if "," in other else f"{other},none"]
    assert results["arc_easy"].others.keys() == {"acc"}
    assert results["gsm8k"].others.keys() == {"exact_match,strict-match"}
    assert results["boolq"].chance == 0.5
    assert results["arc_easy"].chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 3 + 1 / 3 + 1 / 2) / 5)
    assert results["gsm8k"].chance == 0
    scores = {s.score for r in results.values() for s in r.samples}
    assert scores == {0, 1}  # a model that is always wrong would show nothing


def test_in_the_chat_template_the_scores_are_the_harness_own_too(data: Path, loud_model: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = harness_task(data, "arc_easy", "acc", num_fewshot=2, apply_chat_template=True, limit=4)
    write_task_files(task, tmp_path)
    model = HFLM(pretrained=str(loud_model), dtype="float32", device="cpu", batch_size=2)
    theirs = lm_eval.simple_evaluate(
        model,
        tasks=["arc_easy"],
        num_fewshot=2,
        limit=4,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    ours = ask(loud_model, *load_tasks([task]))["arc_easy"]
    assert ours.raw == theirs["results"]["arc_easy"]["acc,none"]
    assert [s.log_likelihoods for s in ours.samples] == [
        tuple(value for value, _ in s["filtered_resps"]) for s in theirs["samples"]["arc_easy"]
    ]
    assert len(ours.samples) == 4
    assert "<|im_start|>" in ours.samples[0].prompt


def test_a_file_of_ours_scores_as_the_same_task_written_for_the_harness(loud_model: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": q, "choices": choices, "answer": i % len(choices)} for i, (q, choices, _) in enumerate(ARC)]
    write(tmp_path, "items", rows)
    described = {
        "task": "same",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    (tmp_path / "include").mkdir()
    (tmp_path / "include/same.yaml").write_text(json.dumps(described))
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(loud_model), dtype="float32", device="cpu", batch_size=2),
        tasks=["same"],
        task_manager=TaskManager(include_path=str(tmp_path / "include"), include_defaults=False),
        bootstrap_iters=0,
    )
    items = str(tmp_path / "items.jsonl")
    task = EvalTask("same", "gen_kn", items, "multiple_choice", "acc_norm", prompt="continuation")
    ours = ask(loud_model, *load_tasks([task]))["same"]
    assert ours.raw == theirs["results"]["same"]["acc_norm,none"]
    assert ours.others["acc"] == theirs["results"]["same"]["acc,none"]
    for mine, their in zip(ours.samples, theirs["samples"]["same"], strict=True):
        assert mine.log_likelihoods == pytest.approx([value for value, _ in their["filtered_resps"]], abs=1e-3)


def test_a_group_is_one_task_with_the_items_of_all(
    data: Path, loud_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's index of groups takes many seconds to build: here it holds two tasks and a group of them."""
    import lm_eval.tasks

    for name, rows in (("one", [0, 1]), ("two", [2, 3, 4])):
        lines = (data / "arc_easy/test.jsonl").read_text().splitlines(keepends=True)
        (data / "pair" / name).mkdir(parents=True)
        (data / "pair" / name / "test.jsonl").write_text("".join(lines[i] for i in rows))
        source = Path(lm_eval.tasks.__file__).parent / "arc/arc_easy.yaml"
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {source}\ntask: {name}\ndataset_name: {name}\ntest_split: test\n"
        )
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [one, {task: two, num_fewshot: 0}]\n")
    real = lm_eval.tasks.TaskManager
    task_index.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            lm_eval.tasks,
            "TaskManager",
            lambda **options: real(**{"include_path": str(tmp_path), "include_defaults": False, **options}),
        )
        (pair,) = load_tasks([harness_task(data, "pair", "acc")])
        with pytest.raises(UserError, match=r"has no task 'pairs'; did you mean 'pair'\?"):
            load_tasks([harness_task(data, "pairs")])
    task_index.cache_clear()
    (whole,) = load_tasks([harness_task(data, "arc_easy", "acc")])
    result = ask(loud_model, pair)["pair"]
    together = ask(loud_model, whole)["arc_easy"]
    assert [s.line for s in result.samples] == [1, 2, 3, 4, 5]
    assert [s.score for s in result.samples] == [s.score for s in together.samples]
    assert result.raw == pytest.approx(together.raw)
    assert result.chance == pytest.approx(together.chance)


def test_what_is_wrong_is_told_before_weights_load(data: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], output: str, name: str = "arc_easy", **changes: Any) -> None:
        with pytest.raises(error, match=output):
            load_tasks([replace(harness_task(data, name), **changes)])

    refused(DataError, r"nowhere: no such folder \(dataset_path of harness task 'arc_easy'\)", path="nowhere")
    refused(DataError, "reads the split 'validation'.*; it has test, train", "boolq", path=str(data / "arc_easy"))
    (data / "arc_easy/train.jsonl").rename(data / "examples.jsonl")
    assert len(load_tasks([harness_task(data, "arc_easy")])[0].items) == 5  # without examples no split of examples
    refused(DataError, "reads the split 'train', .*; it has test", num_fewshot=1)
    (data / "examples.jsonl").rename(data / "arc_easy/train.jsonl")
    refused(UserError, r"has no metric 'acc_nrom'; did you mean 'acc_norm'\?", metric="acc_nrom")
    refused(UserError, r"has no metric 'exact_match,flexible'; did you mean", "gsm8k", metric="exact_match,flexible")
    refused(UserError, "names its own data", "squadv2", path=str(data / "arc_easy"))
    refused(UserError, "cannot be loaded: .choices. is undefined", path=str(data / "gsm8k"))
    refused(UserError, "runs code that the model writes", "humaneval", path=str(human_eval(data)))


def test_a_missing_sentence_table_is_told_of_the_harness_task_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    item = {"key": 1, "prompt": "Hello.", "instruction_id_list": ["length_constraints:number_sentences"]}
    write(tmp_path / "ifeval", "train", [item | {"kwargs": [{"relation": "at least", "num_sentences": 2}]}])
    monkeypatch.setattr(harness_tasks, "punkt_is_there", lambda: False)
    with pytest.raises(UserError, match="harness task 'ifeval': 1 of its items .*nltk.downloader punkt_tab"):
        load_tasks([harness_task(tmp_path, "ifeval")])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(harness_tasks, "punkt_is_there", lambda: True)
    assert len(load_tasks([harness_task(tmp_path, "ifeval")])[0].items) == 1


def human_eval(data: Path) -> Path:
    row = {"task_id": "a", "prompt": "def f():", "canonical_solution": " pass", "test": "", "entry_point": "f"}
    write(data / "humaneval", "test", [row])
    return data / "humaneval"


def test_prompts_that_the_harness_will_cut_are_counted_and_stay(data: Path, loud_model: Path) -> None:
    (task,) = load_tasks([harness_task(data, "arc_easy", num_fewshot=1)])
    tokenizer = load_tokenizer(str(loud_model))
    whole = fit_lengths([task], tokenizer, None)[0]
    assert whole.cut == ()
    some = fit_lengths([task], tokenizer, whole.longest)[0]
    assert 0 < len(some.cut) < len(task.items)
    assert some.items == task.items
    with pytest.raises(DataError, match="no item fits into the model's 3 positions"):
        fit_lengths([task], tokenizer, 3)
    prompts = [s.prompt for s in ask(loud_model, some)["arc_easy"].samples]
    assert prompts == [s.prompt for s in ask(loud_model, whole)["arc_easy"].samples]  # the same few-shot examples


def test_the_hash_follows_what_is_asked_and_not_where_it_lies(data: Path) -> None:
    def sha256(name: str, **changes: Any) -> str:
        return load_tasks([EvalTask(**vars(harness_task(data, "arc_easy")) | {"path": str(data / name)} | changes)])[
            0
        ].sha256

    first = sha256("arc_easy")
    (data / "arc_easy").rename(data / "moved")
    assert sha256("moved") == first
    assert sha256("moved", num_fewshot=1) != first
    assert sha256("moved", limit=2) != first
    text = (data / "moved/test.jsonl").read_text()
    (data / "moved/test.jsonl").write_text(text.replace("Who pays", "Who may"))
    assert sha256("moved") != first
