"""The harness as we drive it: the same tokens as training, and the answers that a slow, obvious loop gives."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import cofitune
from cofitune.data.chat import encode, set_template
from cofitune.data.read import Item
from cofitune.errors import UserError
from cofitune.evaluation import ifeval, metrics
from cofitune.evaluation.items import EvalTask, LoadedTask
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import ScoreRequest, own_code, score_model
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.load import load_model, load_tokenizer
from tests.evaluation.prompts import render_prompt
from tests.helpers import write_jsonl

QUESTIONS: list[dict[str, Any]] = [
    {"question": "Two plus two?", "choices": ["four", "three of them", "Paris"], "answer": 0},
    {"question": "Name the capital of France, please.", "choices": ["world", "Paris is the capital"], "answer": 1},
    {
        "question": "Who pays?",
        "context": "The contract was void.",
        "choices": ["seller", "buyer", "court"],
        "answer": 0,
    },
    {"question": "What may a tenant do?", "choices": ["e", "a", "x", "end the lease; the landlord"], "answer": 3},
    {"question": "One token each?", "choices": ["a", "b", "c", "d"], "answer": 2},
]
PROMPTS = ["Hello world.", "Answer in one sentence, please.", "The court held that the contract was void, and so?"]


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    result = load_tokenizer(str(tiny_model_folder))
    set_template(result, "auto")
    return result


@pytest.fixture
def model(tiny_model_folder: Path) -> Any:
    """Random, with weights large enough that its choices are no coin flips."""
    result = load_model(str(tiny_model_folder), torch.float32)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(8)
    return result


def make_task(folder: Path, items: list[dict[str, Any]], kind: str, metric: str, **changes: Any) -> LoadedTask:
    path = folder / "items.jsonl"
    write_jsonl(path, items)
    fields = {"title": "t", "category": "gen_kn", "path": str(path), "kind": kind, "metric": metric, **changes}
    return load_tasks([EvalTask(**fields)])[0]


def ask(model: Any, tokenizer: Any, task: LoadedTask, batch_size: int = 2) -> TaskResult:
    return score_model(model, ScoreRequest(tokenizer, [task], batch_size))["t"]


def generate_task(
    folder: Path, references: list[str] | None = None, metric: str = "exact_match", **changes: Any
) -> Any:
    answers = references or ["none"] * len(PROMPTS)
    items = [{"instruction": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)]
    return make_task(folder, items, "generate", metric, **changes)


def slow_log_likelihood(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """One token at a time, no cache, no batch."""
    known = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([known])).logits[0, -1]
        total += float(torch.log(torch.softmax(logits.double(), -1))[token])
        known = [*known, token]
    return total


def slow_greedy(model: Any, tokenizer: Any, prompt: str, limit: int, ends: set[int]) -> list[int]:
    known = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < limit:
        with torch.no_grad():
            token = int(model(torch.tensor([known + new])).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_are_scored_as_a_slow_loop_over_them_does(
    tmp_path: Path, model: Any, tokenizer: Any, metric: str
) -> None:
    task = make_task(tmp_path, QUESTIONS, "multiple_choice", metric)
    result = ask(model, tokenizer, task)
    right = 0
    for item, fields, sample in zip(task.items, QUESTIONS, result.samples, strict=True):
        prompt = render_prompt(tokenizer, item)
        slow = [slow_log_likelihood(model, tokenizer, prompt, c) for c in fields["choices"]]
        assert sample.log_likelihoods == pytest.approx(slow, abs=1e-3)
        lengths = [len(c.encode()) if metric == "acc_norm" else 1 for c in fields["choices"]]
        best = max(range(len(slow)), key=lambda i: slow[i] / lengths[i])
        assert (sample.pick, sample.score, sample.reference) == (best, int(best == fields["answer"]), fields["answer"])
        right += best == fields["answer"]
    assert result.raw == pytest.approx(right / len(QUESTIONS))
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 4) / 5)


def test_acc_norm_can_pick_another_choice_than_acc() -> None:
    assert metrics.pick([-4.0, -6.0], ["a", "long one"], "acc") == 0
    assert metrics.pick([-4.0, -6.0], ["a", "long one"], "acc_norm") == 1
    assert metrics.pick([-4.0, -6.0], ["aa", "éé"], "acc_norm") == 1  # bytes, not characters


@pytest.mark.parametrize("prompt", ["chat", "continuation"])
def test_the_loss_is_the_mean_cross_entropy_of_the_references(
    tmp_path: Path, model: Any, tokenizer: Any, prompt: str
) -> None:
    items: list[dict[str, Any]] = [
        {"instruction": "Two plus", "input": "two?", "output": "four, of course"},
        {"question": "Who pays?", "answer": "é"},
        {"question": "Name the capital.", "choices": ["Paris is the capital", "b"], "answer": 0},
    ]
    references = ["four, of course", "é", "Paris is the capital"]
    per_token = make_task(tmp_path, items, "loss", "nats_per_token", prompt=prompt)
    results = [ask(model, tokenizer, per_token, batch_size) for batch_size in (1, 3)]
    nats, tokens, sizes = [], [], []
    for item, reference, sample in zip(per_token.items, references, results[0].samples, strict=True):
        asked = render_prompt(tokenizer, item, prompt)
        text = reference if prompt == "chat" else f" {reference}"
        ids = tokenizer(asked + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        first = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, first - 1 : -1].double()
        nats.append(float(torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")))
        tokens.append(ids.shape[1] - first)
        sizes.append(len(text.encode()))
        assert sample.score == pytest.approx(nats[-1] / tokens[-1], rel=1e-4)
    for result in results:
        assert result.raw == pytest.approx(sum(n / t for n, t in zip(nats, tokens, strict=True)) / 3, rel=1e-4)
        assert result.others["corpus_nats_per_token"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-4)
        assert result.others["corpus_nats_per_byte"] == pytest.approx(sum(nats) / sum(sizes), rel=1e-4)
    per_byte = make_task(tmp_path, items, "loss", "nats_per_byte", prompt=prompt)
    expected = sum(n / s for n, s in zip(nats, sizes, strict=True)) / 3
    assert ask(model, tokenizer, per_byte).raw == pytest.approx(expected, rel=1e-4)


def test_choices_may_go_on_in_the_items_own_text(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    task = make_task(tmp_path, QUESTIONS, "multiple_choice", "acc_norm", prompt="continuation")
    result = ask(model, tokenizer, task)
    for item, sample in zip(task.items, result.samples, strict=True):
        slow = [slow_log_likelihood(model, tokenizer, item.prompt, f" {c}") for c in item.choices]
        assert sample.log_likelihoods == pytest.approx(slow, abs=1e-3)
        per_byte = [v / len(c.encode()) for v, c in zip(slow, item.choices, strict=True)]
        assert sample.pick == per_byte.index(max(per_byte))
    picks = [
        metrics.pick(s.log_likelihoods or (), i.choices, "acc") for s, i in zip(result.samples, task.items, strict=True)
    ]
    right = sum(p == q["answer"] for p, q in zip(picks, QUESTIONS, strict=True))
    assert result.others == {"acc": right / len(QUESTIONS)}


def test_an_answer_is_worth_what_the_metric_says(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    answers = [s.answer or "" for s in ask(model, tokenizer, generate_task(tmp_path, max_new_tokens=12)).samples]
    for metric in ("f1", "chrf", "bleu"):
        references = ["the court pays the buyer", f"{answers[1]} and more", answers[2]]
        result = ask(model, tokenizer, generate_task(tmp_path, references, metric, max_new_tokens=12))
        scores = [metrics.text_score(metric, a, [r]) for a, r in zip(answers, references, strict=True)]
        assert [s.score for s in result.samples] == scores
        assert result.raw == pytest.approx(sum(scores) / 3)
        assert set(result.others) == (set() if metric == "f1" else {f"corpus_{metric}"})


def test_the_batch_size_changes_no_pick_and_no_answer(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    picks, answers = [], []
    for batch_size in (1, 3, 16):
        chosen = ask(model, tokenizer, make_task(tmp_path, QUESTIONS, "multiple_choice", "acc"), batch_size)
        picks.append([s.pick for s in chosen.samples])
        answers.append(
            [s.answer for s in ask(model, tokenizer, generate_task(tmp_path, max_new_tokens=6), batch_size).samples]
        )
    assert picks[0] == picks[1] == picks[2]
    assert answers[0] == answers[1] == answers[2]


def test_answers_are_those_of_a_slow_greedy_loop_up_to_the_limit(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    task = generate_task(tmp_path, max_new_tokens=7)
    result = ask(model, tokenizer, task, batch_size=3)
    for item, sample in zip(task.items, result.samples, strict=True):
        new = slow_greedy(model, tokenizer, render_prompt(tokenizer, item), 7, {tokenizer.eos_token_id})
        assert sample.answer == tokenizer.decode(new)
        assert sample.prompt == render_prompt(tokenizer, item)


def test_an_answer_ends_at_stop_strings_and_end_tokens_without_sampling(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    item = generate_task(tmp_path).items[1]
    new = slow_greedy(model, tokenizer, render_prompt(tokenizer, item), 8, {tokenizer.eos_token_id})
    model.generation_config.temperature, model.generation_config.do_sample = 5.0, True
    model.generation_config.repetition_penalty = 3.0
    stop = tokenizer.decode(new[3:4])
    stopped = ask(model, tokenizer, generate_task(tmp_path, max_new_tokens=8, stop=(stop,)), batch_size=3)
    assert stop.strip()
    assert stopped.samples[1].answer == tokenizer.decode(new).split(stop)[0]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, new[2]]
    ended = ask(model, tokenizer, generate_task(tmp_path, max_new_tokens=8), batch_size=3)
    assert ended.samples[1].answer == tokenizer.decode(new[: new.index(new[2])])
    assert model.generation_config.repetition_penalty == 3.0  # given back


def test_a_stop_string_ends_its_own_row(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """Decoding is over when each row has met its end: one the end token, the others a stop string each."""
    prompts = [render_prompt(tokenizer, item) for item in generate_task(tmp_path).items]
    rows = [slow_greedy(model, tokenizer, p, 40, {tokenizer.eos_token_id}) for p in prompts]
    end, stops = rows[0][1], tuple(tokenizer.decode(row[1:2]) for row in rows[1:])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    result = ask(model, tokenizer, generate_task(tmp_path, max_new_tokens=40, stop=stops), batch_size=3)
    assert len(steps) <= 3
    for row, sample in zip(rows, result.samples, strict=True):
        text = tokenizer.decode(row[: row.index(end)] if end in row else row)
        assert sample.answer == text[: min([text.index(s) for s in stops if s in text], default=len(text))]
    assert not any(s in tokenizer.decode(rows[0][:1]) for s in stops)  # else the first row shows nothing


def test_exact_match_and_regex_are_graded_as_plain_python_would(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    answers = [s.answer or "" for s in ask(model, tokenizer, generate_task(tmp_path, max_new_tokens=6)).samples]
    exact = generate_task(tmp_path, [f"  {answers[0]} \n", "wrong", answers[2]], max_new_tokens=6)
    assert [s.score for s in ask(model, tokenizer, exact).samples] == [1, 0, 1]
    pattern = "^(.)"
    first = [re.search(pattern, a)[1] for a in answers]  # type: ignore[index]
    task = generate_task(tmp_path, [first[0], first[1] + "x", first[2]], "regex", pattern=pattern, max_new_tokens=6)
    assert [s.score for s in ask(model, tokenizer, task).samples] == [1, 0, 1]


def test_ifeval_is_judged_strictly_by_all_instructions(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    names, kwargs = (
        ["punctuation:no_comma", "length_constraints:number_words"],
        {"relation": "at least", "num_words": 2},
    )
    items = [
        {"key": 1, "prompt": "Hello.", "instruction_id_list": names[:1], "kwargs": [{}]},
        {"key": 2, "prompt": "Hello.", "instruction_id_list": names, "kwargs": [{}, kwargs]},
        {"key": 3, "prompt": "Hello.", "instruction_id_list": names, "kwargs": [{}, kwargs | {"num_words": 900}]},
    ]
    result = ask(model, tokenizer, make_task(tmp_path, items, "ifeval", "prompt_strict", max_new_tokens=12))
    for sample, words in zip(result.samples, (0, 2, 900), strict=True):
        answer = sample.answer or ""
        obeyed = bool(answer.strip()) and "," not in answer and len(re.findall(r"\w+", answer)) >= words
        assert sample.score == int(obeyed)
    checks: ifeval.Checks = {"key": 2, "prompt": "Hello.", "instruction_id_list": names, "kwargs": [{}, kwargs]}
    assert ifeval.follows_instructions(checks, "one two three")
    assert not ifeval.follows_instructions(checks, "one, two three")
    assert not ifeval.follows_instructions(checks, "one")


def test_open_instructions_have_one_verdict_and_leave_the_random_state(tmp_path: Path) -> None:
    checks: ifeval.Checks = {
        "key": 1, "prompt": "p", "instruction_id_list": ["keywords:letter_frequency"], "kwargs": [{}],
    }  # fmt: skip
    before = random.getstate()
    verdicts = {ifeval.follows_instructions(checks, "hello world of letters") for _ in range(20)}
    assert len(verdicts) == 1
    assert random.getstate() == before


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("bos", [None, "<|im_start|>", "<|im_end|>"])
def test_the_model_is_asked_with_the_tokens_that_it_was_taught_with(
    tmp_path: Path, model: Any, tokenizer: Any, template: str, bos: str | None
) -> None:
    if bos:  # a tokenizer that puts a BOS before all that it is given; what the template writes is there already
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    set_template(tokenizer, template)
    asked: list[list[int]] = []
    forward = model.forward

    def listen(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["input_ids"][0].tolist())
        return forward(*args, **kwargs)

    model.forward = listen
    question, choice = "Two plus two?", "four of them, please"
    for kind, fields in (
        ("generate", {"instruction": "Two plus", "input": "two?", "answer": "4"}),
        ("multiple_choice", {"question": question, "choices": [choice, choice], "answer": 0}),
    ):
        asked.clear()
        task = make_task(tmp_path, [fields], kind, "exact_match" if kind == "generate" else "acc", max_new_tokens=1)
        score_model(model, ScoreRequest(tokenizer, [task], 1))
        taught = encode(Item((("user", task.items[0].prompt), ("assistant", choice)), "here"), tokenizer)
        first = next(i for i, label in enumerate(taught.labels) if label != -100)
        assert asked[0] == taught.input_ids[:first]
        if kind == "multiple_choice":  # all of the choice but its last token, which is only predicted
            length = len(asked[1])
            assert asked[1] == taught.input_ids[first : first + length]
            assert tokenizer.decode(taught.input_ids[first : first + length + 1]) == choice


def test_a_changed_file_changes_the_scores(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    before = ask(model, tokenizer, make_task(tmp_path, QUESTIONS[:1], "multiple_choice", "acc"))
    pick = before.samples[0].pick or 0
    for answer, score in ((pick, 1), ((pick + 1) % 3, 0), (pick, 1)):
        task = make_task(tmp_path, [QUESTIONS[0] | {"answer": answer}], "multiple_choice", "acc")
        assert ask(model, tokenizer, task).raw == score


def test_model_and_random_state_are_left_alone_and_nothing_is_printed(
    tmp_path: Path, model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    task = generate_task(tmp_path, max_new_tokens=3)
    choices = make_task(tmp_path, QUESTIONS, "multiple_choice", "acc", title="c")
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    capfd.readouterr()
    score_model(model, ScoreRequest(tokenizer, [task, choices], 2))
    assert [m.training for m in model.modules()] == modes
    assert any(modes) and not all(modes)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_without_the_extra_the_user_is_told_what_to_install(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = generate_task(tmp_path)
    monkeypatch.setattr(ifeval, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        ask(model, tokenizer, task)


def test_the_hash_of_own_code_has_every_file_that_answers() -> None:
    """What scoring imports of the rooms that make tokens, ask and grade; all else moves values about."""
    rooms = "data", "evaluation", "model"
    files = "(getattr(m, '__file__', '') for m in sys.modules.values())"
    code = f"import sys, cofitune.evaluation.harness.model; print(*{files})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package = Path(cofitune.__file__).parent
    used = {Path(f) for f in process.stdout.split() if any(Path(f).is_relative_to(package / room) for room in rooms)}
    assert len(used) > 15 and used <= set(own_code())
    assert {package / "model" / "decode.py", package / "training" / "loss.py"} <= set(own_code())
