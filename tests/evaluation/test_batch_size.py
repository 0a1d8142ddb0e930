"""How many items are asked at once: what an item takes, against bytes that are counted, and what fits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cofitune.evaluation import batch_size
from cofitune.evaluation.batch_size import AskingMemory, DeviceMemory, estimate_asking, power_below, powers_down_from
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.lengths import fit_lengths
from cofitune.evaluation.score import ScoreRequest, score_model
from cofitune.evaluation.tasks import load_tasks
from cofitune.model.anatomy import anatomy_of
from tests.helpers import WORDS, write_jsonl
from tests.peak import PeakBytes

GIB = 2**30


@pytest.mark.parametrize("kind", ["generate", "multiple_choice", "loss"])
def test_an_item_takes_no_more_than_estimated(kind: Any, tmp_path: Path, tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    answer: dict[str, Any] = {"answer": "the buyer " * 8}
    if kind == "multiple_choice":
        answer = {"choices": ["the buyer pays " * 4, "the seller pays " * 4], "answer": 0}
    items = [{"question": f"Who pays, and why, says {word}? " * 12, **answer} for word in WORDS + WORDS[:5]]
    items[11:] = [{**item, "question": f"{item['question']}?"} for item in items[11:]]
    path = write_jsonl(tmp_path / "items.jsonl", items)
    metric = {"generate": "exact_match", "multiple_choice": "acc", "loss": "nats_per_token"}[kind]
    (task,) = load_tasks([EvalTask("t", "speciality", str(path), kind, metric, max_new_tokens=32)])
    (fitted,) = fit_lengths([task], tokenizer, 512)
    estimated = estimate_asking(anatomy_of(model), [fitted], 4)

    def peak(size: int) -> int:
        with PeakBytes() as counted:
            score_model(model, ScoreRequest(tokenizer, [task], size))
        return counted.most

    an_item = (peak(16) - peak(8)) / 8
    assert 0.8 * an_item < estimated.items["t"] < 4 * an_item, "neither too little nor a waste"
    assert estimated.weights == sum(p.numel() for p in model.parameters()) * 4


def test_a_process_that_holds_nothing_on_a_gpu_makes_no_context_there(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SimpleNamespace(total_memory=80 * GIB, uuid="one")
    held, asked = [0], {"one": 70 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB) if held[0] else pytest.fail())
    monkeypatch.setattr(batch_size, "free_gpu_memory", asked.get)
    assert batch_size.device_memory() == DeviceMemory(80 * GIB, 70 * GIB, True)
    asked.clear()
    assert batch_size.device_memory() == DeviceMemory(80 * GIB, None, True), "the driver does not say"
    held[0] = 5 * GIB
    assert batch_size.device_memory() == DeviceMemory(80 * GIB, 65 * GIB, True), "a rank has a context anyway"


def test_as_many_items_are_asked_as_fit_beside_the_weights() -> None:
    needed = AskingMemory(10 * GIB, {"short": GIB // 8, "long": 3 * GIB, "tiny": 1})

    def sizes(**changes: Any) -> list[int]:
        device = DeviceMemory(**{"total": 80 * GIB, "free": None, "on_gpu": True} | changes)
        return [needed.batch(title, device) for title in ("short", "long", "tiny")]

    assert sizes() == [64, 8, 64], "half of the 70 GiB beside the weights holds eleven long items"
    assert sizes(on_gpu=False) == [16, 8, 16]
    assert sizes(free=80 * GIB) == [64, 8, 64], "all is free"
    assert sizes(free=20 * GIB) == [64, 2, 64], "others are on the device: 8 GiB are left"
    assert sizes(total=9 * GIB) == [1, 1, 1], "not even the weights fit"
    assert needed.bytes_with({"short": 64, "long": 8, "tiny": 64}) == 34 * GIB


def test_sizes_are_powers_of_two() -> None:
    assert [power_below(n) for n in (-3, 0, 1, 2, 3, 15, 16, 64)] == [1, 1, 1, 2, 2, 8, 16, 64]
    assert powers_down_from(16) == [16, 8, 4, 2, 1] and powers_down_from(1) == [1]


def test_the_longest_question_with_its_answer_counts(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    items = [{"question": "Who? " * n, "answer": "me"} for n in (3, 30)]
    path = write_jsonl(tmp_path / "items.jsonl", items)
    (task,) = load_tasks([EvalTask("t", "speciality", str(path), "generate", "exact_match", max_new_tokens=24)])
    (fitted,) = fit_lengths([task], tokenizer, None)
    assert fitted.longest_whole == fitted.longest + 24 and fitted.logits_at_once == 1


def test_the_precision_counts(tiny_model_folder: Path) -> None:
    anatomy = anatomy_of(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    assert estimate_asking(anatomy, [], 2).weights * 2 == estimate_asking(anatomy, [], 4).weights
