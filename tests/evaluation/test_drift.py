"""Drift as a score: against plain forward passes, and against what training measures."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.errors import ArtifactError
from cofitune.evaluation.data_parallel import BatchSharding
from cofitune.evaluation.drift import score_drift
from cofitune.evaluation.items import EvalTask, LoadedTask
from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.statistics.paired import TaskItems
from cofitune.evaluation.tasks import load_drift
from cofitune.rehearsal.generate import Answer, store_probabilities
from cofitune.rehearsal.items import RehearsalExamples, RehearsalItem, write_rehearsal
from cofitune.training.drift import HeldOut, measure_drift
from cofitune.training.engine import start_distributed

TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
MADE = {"base": "b", "base_fingerprint": "f", "tokenizer_sha256": "t", "template": "chat"}
LENGTHS = [(3, 4), (7, 1), (2, 9), (5, 5), (4, 6)]  # of prompts and answers; the second item is trained on


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A base, and what it became."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = LlamaForCausalLM(config).eval()
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for weight in tuned.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return base, tuned


def write(folder: Path, base: Any, k: int) -> list[RehearsalItem]:
    chance = torch.Generator().manual_seed(0)
    items = []
    for number, (prompt, answer) in enumerate(LENGTHS):
        ids = torch.randint(1, 60, (prompt + answer,), generator=chance).tolist()
        asked = ({"role": "user", "content": f"Prompt {number}"},)
        items.append(
            RehearsalItem(asked, f"a{number}", tuple(ids[:prompt]), tuple(ids[prompt:]), True, number != 1, "")
        )
    answers = [Answer(item.answer_ids, True) for item in items]
    top_k, own = store_probabilities(base, [item.prompt_ids for item in items], answers, k, 0)
    write_rehearsal(folder, items, top_k, own, MADE | {"top_k": k})
    return items


def load(folder: Path, **changes: Any) -> LoadedTask:
    return load_drift(EvalTask("drift", "drift", str(folder), "drift", "drift", **changes))


def score(model: Any, folder: Path, batch_size: int = 2, **changes: Any) -> TaskResult:
    return score_drift(model, TOKENIZER, load(folder, **changes), batch_size, BatchSharding())


def log_probs(model: Any, item: RehearsalItem) -> Tensor:
    """Log-probabilities of the whole vocabulary at an answer's tokens, of one text alone [its tokens, V]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*item.prompt_ids, *item.answer_ids]])).logits[0]
    return logits[len(item.prompt_ids) - 1 : -1].double().log_softmax(-1)


def test_the_base_has_not_drifted_from_itself(models: tuple[Any, Any], tmp_path: Path) -> None:
    write(tmp_path, models[0], 5)
    result = score(models[0], tmp_path)
    assert abs(result.raw) <= 1e-5 and all(abs(s.score) <= 1e-5 for s in result.samples)
    assert abs(result.others["kl"]) <= 1e-5
    assert [s.line for s in result.samples] == [1, 3, 4, 5], "held-out items alone"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_drift_is_the_mean_loss_of_log_probability_over_all_tokens(
    models: tuple[Any, Any], tmp_path: Path, batch_size: int
) -> None:
    base, tuned = models
    items = [item for item in write(tmp_path, base, 5) if item.held_out]
    lost = []
    for item in items:
        places = torch.arange(len(item.answer_ids)), torch.tensor(item.answer_ids)
        lost.append(float((log_probs(base, item)[places] - log_probs(tuned, item)[places]).sum()))
    tokens = sum(len(item.answer_ids) for item in items)
    result = score(tuned, tmp_path, batch_size)
    assert result.raw == pytest.approx(sum(lost) / tokens, abs=1e-5) and abs(result.raw) > 1e-3
    each = [s.score for s in result.samples]
    assert each == pytest.approx([nats / (tokens / len(items)) for nats in lost], abs=1e-5)
    assert sum(each) / len(each) == pytest.approx(result.raw, abs=1e-12)


def test_the_divergence_is_that_of_the_stored_classes(models: tuple[Any, Any], tmp_path: Path) -> None:
    base, tuned = models
    items = [item for item in write(tmp_path, base, 5) if item.held_out]
    total = tokens = 0.0
    for item in items:
        for p, q in zip(log_probs(base, item).exp(), log_probs(tuned, item).exp(), strict=True):
            top = p.topk(5).indices
            classes = [torch.cat([x[top], (1 - x[top].sum())[None]]) for x in (p, q)]
            total += float((classes[0] * (classes[0] / classes[1]).log()).sum())
            tokens += 1
    assert score(tuned, tmp_path).others["kl"] == pytest.approx(total / tokens, rel=1e-4)


def test_with_all_classes_stored_it_is_the_whole_divergence(models: tuple[Any, Any], tmp_path: Path) -> None:
    base, tuned = models
    items = [item for item in write(tmp_path, base, 60) if item.held_out]
    pairs = [(log_probs(base, item), log_probs(tuned, item)) for item in items]
    whole = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()
    assert score(tuned, tmp_path).others["kl"] == pytest.approx(float(whole), rel=1e-4)


def test_it_is_what_training_measures(models: tuple[Any, Any], tmp_path: Path) -> None:
    base, tuned = models
    write(tmp_path, base, 5)
    loaded = load(tmp_path)
    assert loaded.rehearsal is not None
    examples = RehearsalExamples(loaded.rehearsal, True, 512, with_top_k=True)
    own = torch.cat(examples.base_log_probs()).double()
    start_distributed()
    record = measure_drift(tuned, HeldOut(examples, float(own.mean()), len(own)), 2, 0, step=3)
    tuned.eval()
    result = score(tuned, tmp_path)
    assert record.step == 3 and record.drift == pytest.approx(result.raw, abs=1e-5)
    assert record.kl == pytest.approx(result.others["kl"], abs=1e-5)


def test_without_stored_probabilities_there_is_drift_and_no_divergence(models: tuple[Any, Any], tmp_path: Path) -> None:
    write(tmp_path / "with", models[0], 5)
    write(tmp_path / "without", models[0], 0)
    result = score(models[1], tmp_path / "without")
    assert result.others == {} and result.raw == pytest.approx(score(models[1], tmp_path / "with").raw, abs=1e-6)


def test_a_limit_takes_the_first_held_out_items(models: tuple[Any, Any], tmp_path: Path) -> None:
    write(tmp_path, models[0], 5)
    assert [s.line for s in score(models[1], tmp_path, limit=2).samples] == [1, 3]


def test_a_rehearsal_that_holds_out_nothing_is_refused(models: tuple[Any, Any], tmp_path: Path) -> None:
    item = RehearsalItem(({"role": "user", "content": "a"},), "b", (1,), (2,), True, False, "")
    top_k, own = store_probabilities(models[0], [[1]], [Answer((2,), True)], 2, 0)
    write_rehearsal(tmp_path, [item], top_k, own, MADE | {"top_k": 2})
    with pytest.raises(ArtifactError, match=r"holds out no item .*rehearsal\.held_out above 0"):
        load(tmp_path)


def test_no_item_of_it_is_lost_or_gained() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0], [5.0, -3.0, 0.0]]).double().numpy()
    assert TaskItems("drift", METRICS["drift"], 0.0, scores).changed(1, 0) == ((), ())
    assert TaskItems("instruct", METRICS["nats_per_token"], 0.0, scores + 1).changed(1, 0) != ((), ())
