"""Trials that are measured by losses: each figure against a plain loop over the items, and the whole of a trial."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaMLP

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.executors.local import local_executor
from cofitune.launch.launcher import Ranks
from cofitune.model.load import load_tokenizer
from cofitune.recipes.rehearse.recipe import rehearse
from cofitune.recipes.trial import loss_items
from cofitune.recipes.trial.executor import TrialRequest, TrialResult
from cofitune.recipes.trial.loss_items import Choices, mean_margin
from cofitune.recipes.trial.runner import TrialRunner
from cofitune.rehearsal.items import read_rehearsal
from cofitune.search.measured import CurvePoint
from tests.helpers import write_jsonl

WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord"]
TAUGHT = [{"instruction": f"Say {w}{' please' * (i % 3)}", "output": f"the {w}"} for i, w in enumerate(WORDS)]
ANSWERS = ["yes, it is", "no", "perhaps"]
CHOICES: list[dict[str, Any]] = [
    {"question": f"Is it {w}?", "choices": ANSWERS, "answer": i % 3} for i, w in enumerate(WORDS)
]


def write(path: Path, items: list[dict[str, Any]]) -> str:
    write_jsonl(path, items)
    return str(path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Any]:
    """A trial's config, its region and folder left out; the rehearsal is made."""
    folder = tmp_path_factory.mktemp("losses")
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": write(folder / "train.jsonl", TAUGHT), "max_length": 64},
        "train": {
            "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "warmup_ratio": 0, "save_steps": None, "rehearsal": {"share": 0.2, "path": str(folder / "run/rehearsal")},
        },
        "rehearsal": {
            "data": write(folder / "prompts.jsonl", [{"prompt": f"Tell me of the {w}."} for w in WORDS]),
            "max_new_tokens": 6, "max_repetition": 1.0, "top_k": 400, "engine": "transformers", "held_out": 0.4,
        },
        "search": {"measure": "loss", "train_steps": 4, "points": 2},
        "eval": {
            "batch_size": 3,
            "speciality": [{"path": write(folder / "law.jsonl", TAUGHT[:5]), "kind": "generate", "max_new_tokens": 8}],
            "versatility": {"gen_kn": [{"path": write(folder / "know.jsonl", CHOICES), "kind": "multiple_choice"}]},
        },
        "softmask": {"apply_to": "none"},
        "region": {"layers": "1-2", "modules": ["up_proj", "down_proj"]},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    rehearse(load(config, folder), console=Console(quiet=True))
    return config


def load(config: dict[str, Any], folder: Path) -> Config:
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return load_config(folder / "config.yaml")


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    return TrialRunner(Console(quiet=True))


def request(settings: dict[str, Any], folder: Path, **fields: Any) -> TrialRequest:
    folder.mkdir(parents=True, exist_ok=True)
    config = load(settings | {"output_dir": str(folder)}, folder.parent)
    return TrialRequest(folder.name, config, folder, **fields)


def nats(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """A plain loop's: −log p(answer | prompt), token by token, and how many tokens that is."""
    ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[place - 1, ids[place]]) for place in range(first, len(ids))), len(ids) - first


@torch.no_grad()
def by_hand(settings: dict[str, Any], tensors: dict[str, Any]) -> tuple[float, float, float]:
    """Speciality loss, KL(base ‖ model) over the whole vocabulary, and margin of a model, item by item."""
    from transformers import AutoModelForCausalLM

    base, model = (AutoModelForCausalLM.from_pretrained(settings["model"]["name"]).eval() for _ in range(2))
    model.load_state_dict(tensors, strict=False)
    tokenizer = load_tokenizer(settings["model"]["name"])

    def prompt(text: str) -> str:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )

    answers = [nats(model, tokenizer, prompt(i["instruction"]), i["output"]) for i in TAUGHT[:5]]
    divergences = []
    rehearsal = read_rehearsal(Path(settings["train"]["rehearsal"]["path"]))
    for place in rehearsal.of(held_out=True):
        item = rehearsal.items[place]
        ids = torch.tensor([[*item.prompt_ids, *item.answer_ids]])
        own, other = (m(ids).logits[0].double().log_softmax(-1) for m in (base, model))
        kl = (own.exp() * (own - other)).sum(-1)
        divergences += kl[len(item.prompt_ids) - 1 : -1].tolist()
    margins = []
    for asked in CHOICES:
        values = [-nats(model, tokenizer, prompt(asked["question"]), choice)[0] for choice in ANSWERS]
        right = values.pop(asked["answer"])
        margins.append(right - max(values))
    return (
        sum(n for n, _ in answers) / sum(count for _, count in answers),
        sum(divergences) / len(divergences),
        sum(margins) / len(margins),
    )


def test_every_figure_of_a_trial_is_that_of_a_plain_loop(
    settings: dict[str, Any], runner: TrialRunner, tmp_path: Path
) -> None:
    result = runner.run(request(settings, tmp_path / "trial"))
    assert [point.steps for point in result.curve] == [2, 4]
    scored = request(settings, tmp_path / "again")
    trained = runner._train(runner._base(scored.config.model), scored)  # the same training, whose weights are kept
    loss, drift, margin = by_hand(settings, trained.tensors)
    assert result.curve[-1].loss == pytest.approx(loss, rel=1e-5)
    assert result.curve[-1].drift == pytest.approx(drift, rel=1e-3) and drift > 1e-4
    assert result.margins == {"gen_kn": pytest.approx(margin, abs=1e-5)}
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "trial" / "eval").exists()
    assert set(result.seconds) == {"start", "train", "evaluate"} and result.seconds["evaluate"] > 0


def test_the_base_has_its_loss_and_no_drift(settings: dict[str, Any], runner: TrialRunner, tmp_path: Path) -> None:
    result = runner.run(request(settings, tmp_path / "base", train=False))
    loss, drift, margin = by_hand(settings, {})
    (point,) = result.curve
    assert (point.steps, point.drift) == (0, 0.0) and point.loss == pytest.approx(loss, rel=1e-5)
    assert drift == pytest.approx(0, abs=1e-9)
    assert result.margins == {"gen_kn": pytest.approx(margin, abs=1e-5)}


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
def test_a_question_is_read_once_where_attention_can(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """And where it cannot, or the config names a kernel, the margins are the same."""
    model = settings["model"] | {"attn_implementation": kernel}
    tokens: list[int] = []
    original = loss_items.supervised_logits

    def counted(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        tokens.append(int(batch["attention_mask"].sum()))
        return original(model, batch)

    monkeypatch.setattr(loss_items, "supervised_logits", counted)
    own = TrialRunner(Console(quiet=True))
    asked = request(settings | {"model": model}, tmp_path / "base", train=False)
    result = own.run(asked)
    assert result.margins == {"gen_kn": pytest.approx(by_hand(settings, {})[2], abs=1e-5)}
    (choices,) = own._loss_items(asked).choices
    apart = sum(len(example.input_ids) for example in choices.examples)
    once = sum(one.num_tokens for one in choices.shared(3))
    assert sum(tokens) == (once if kernel == "auto" else apart)
    assert once < 0.7 * apart


@torch.no_grad()
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_ranks_share_the_choices_out(settings: dict[str, Any], tmp_path: Path, size: int, once: bool) -> None:
    """All run equally many batches, of no more than the batch size was chosen for, and each choice is read once."""
    asked = request(settings, tmp_path / "base", train=False)
    own = TrialRunner(Console(quiet=True))
    own.run(asked)
    items = replace(own._loss_items(asked), batch_size=size)
    (choices,) = items.choices
    most_tokens = size * max(len(example.input_ids) for example in choices.examples)
    most_labels = size * max(example.num_supervised for example in choices.examples)
    model = own._base(asked.config.model).instantiate({}).eval()
    sums: dict[int, torch.Tensor] = {}
    with loss_items.reading_questions_once(model, once) as reads_once:
        assert reads_once == once
        for ranks in (1, 2, 3):
            shares = [list(loss_items._batches(choices, items, once, rank, ranks)) for rank in range(ranks)]
            assert len({len(share) for share in shares}) == 1
            batches = [batch for share in shares for batch in share]
            assert all(int((b["labels"] != -100).sum()) <= most_labels for b in batches)
            assert not once or all(b["input_ids"].numel() <= most_tokens for b in batches)
            found = (loss_items._log_probs(model, model.device, len(choices.examples), share) for share in shares)
            sums[ranks] = torch.stack(list(found)).sum(0)
    for ranks in (2, 3):
        torch.testing.assert_close(sums[ranks], sums[1], rtol=1e-5, atol=1e-5)
    assert (sums[1] < 0).all()


def test_a_trial_that_paused_has_the_curve_of_one_that_did_not(
    settings: dict[str, Any], runner: TrialRunner, tmp_path: Path
) -> None:
    whole = runner.run(request(settings, tmp_path / "whole"))
    half = runner.run(request(settings, tmp_path / "paused", stop_step=2))
    assert half.curve == whole.curve[:1] and half.margins == {}
    end = runner.run(request(settings, tmp_path / "paused"))
    assert (end.curve, end.margins) == (whole.curve, whole.margins)


@pytest.mark.processes
def test_two_ranks_measure_what_one_does_and_go_on_where_they_paused(
    settings: dict[str, Any], runner: TrialRunner, tmp_path: Path
) -> None:
    one = runner.run(request(settings, tmp_path / "one"))
    halved = settings | {
        "train": settings["train"] | {"per_device_train_batch_size": 2},  # on each of two ranks
        "search": settings["search"] | {"prefix_cache": "memory"},
    }
    parts = [request(halved, tmp_path / "two", stop_step=step) for step in (2, None)]
    with local_executor(Ranks(2, (), ("--num-processes", "2"))) as execute:
        half, whole = execute(parts)
    assert (half.error, whole.error) == (None, None) and half.curve == whole.curve[:1]
    assert [p.steps for p in whole.curve] == [p.steps for p in one.curve]
    for own, other in zip(whole.curve, one.curve, strict=True):
        assert own.loss == pytest.approx(other.loss, rel=1e-4) and own.drift == pytest.approx(other.drift, rel=1e-3)
    assert whole.margins == {"gen_kn": pytest.approx(one.margins["gen_kn"], abs=1e-3)}
    assert whole.seconds["evaluate"] > 0 and half.margins == {}


def test_measuring_changes_no_bit_of_the_training(
    settings: dict[str, Any], runner: TrialRunner, tmp_path: Path
) -> None:
    def steps(points: int) -> list[Any]:
        asked = request(
            settings | {"search": {"measure": "loss", "train_steps": 4, "points": points}}, tmp_path / str(points)
        )
        runner.run(asked)
        lines = map(json.loads, (asked.folder / "train" / "metrics.jsonl").read_text().splitlines())
        return [(line["loss"], line["rehearsal_loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]

    assert steps(4) == steps(1)


def test_data_validation_stands_in_for_tasks(settings: dict[str, Any], runner: TrialRunner, tmp_path: Path) -> None:
    data = settings["data"] | {"validation": settings["data"]["train"]}
    asked = request(settings | {"data": data, "eval": {"batch_size": 3}}, tmp_path / "trial")
    result = runner.run(asked)
    assert len(result.curve) == 2 and result.margins == {}
    assert result.curve[-1].loss != runner.run(request(settings, tmp_path / "other")).curve[-1].loss
    few = settings["search"] | {"limit": 3}
    asked = request(settings | {"data": data, "eval": {"batch_size": 3}, "search": few}, tmp_path / "few")
    taken = runner._loss_items(asked).development
    assert len(taken) == 3, "search.limit counts there, too"
    whole = runner._data(asked.config.model, asked.config.data, ()).validation
    assert sorted(e.input_ids for e in taken) == sorted(whole[n].input_ids for n in (0, 4, 7)), "spread evenly"


def test_the_time_of_a_trial_is_known_after_a_few_steps(
    settings: dict[str, Any], runner: TrialRunner, tmp_path: Path
) -> None:
    measured = runner.measure(request(settings, tmp_path / "measured"))
    assert measured.seconds_a_step > 0 and measured.seconds_to_evaluate > 0


def test_a_margin_is_the_right_choices_over_the_likeliest_wrong_one() -> None:
    choices = Choices("gen_kn", [], [(range(3), 1), (range(3, 5), 0)])
    assert mean_margin(choices, [-5.0, -2.0, -3.0, -4.0, -1.0]) == pytest.approx((1.0 - 3.0) / 2)


def test_requests_and_results_travel_as_json(settings: dict[str, Any], tmp_path: Path) -> None:
    asked = request(settings, tmp_path / "trial", stop_step=2)
    assert TrialRequest.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    moved = TrialRequest.from_json(asked.to_json(), tmp_path / "elsewhere")
    assert moved.folder == tmp_path / "elsewhere" and moved.config.output_dir == str(moved.folder)
    assert replace(moved, folder=asked.folder, config=asked.config) == asked
    result = TrialResult(asked, None, {"train": 1.5}, (CurvePoint(2, 1.0, 0.5),), {"gen_kn": -0.5})
    assert TrialResult.from_json(asked, json.loads(json.dumps(result.to_json()))) == result


def test_a_kept_prefix_gives_the_same_figures_and_is_measured_without(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below its first trained layer nothing moves: the second look, and the next trial's looks, begin there."""
    expected = TrialRunner(Console(quiet=True)).run(request(settings, tmp_path / "whole"))
    search = {**settings["search"], "prefix_cache": "memory"}
    runs: list[str] = []
    original = LlamaMLP.forward

    def counted(self: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
        runs.append("layer")
        return original(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    own, counts = TrialRunner(Console(quiet=True)), []
    for name in ("first", "second"):
        result = own.run(request({**settings, "search": search}, tmp_path / name))
        assert (result.curve, result.margins) == (expected.curve, expected.margins), "to the same bits"
        counts.append(len(runs))
        runs.clear()
    own.run(request(settings, tmp_path / "without"))
    without = len(runs)
    assert counts[1] < counts[0] < without
    # of 4 layers the lowest is not run again: nothing but the check of the replay runs it in a second trial
    assert counts[1] <= without * 3 / 4 + 4
