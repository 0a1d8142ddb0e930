"""Choices of models whose cache holds more than keys and values: recurrent, linear and convolution layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cofitune.evaluation.data_parallel import BatchSharding
from cofitune.evaluation.harness.choices import score_whole
from cofitune.evaluation.harness.model import ChatTemplateLM
from cofitune.model.decode import has_key_value_cache
from tests.families import tiny_config

RECURRENT = (
    "bamba falcon_h1 granitemoehybrid jamba lfm2 mamba mamba2 minimax olmo_hybrid qwen3_next recurrent_gemma rwkv "
    "xlstm zamba2"
)
CONTEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
CHOICES = [[20], [21, 22], [23, 24, 25, 26]]
REQUESTS = [(("", ""), context, choice) for context in CONTEXTS for choice in CHOICES]


def tiny_model(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(type(AutoConfig.for_model(kind)))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def alone(model: PreTrainedModel, context: list[int], choice: list[int]) -> tuple[float, bool]:
    """The obvious way: one row, nothing padded, every token's own log-probability."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([context + choice]), use_cache=False).logits[0].float().log_softmax(-1)
    rows = log_probs[len(context) - 1 : -1]
    return sum(float(row[token]) for row, token in zip(rows, choice, strict=True)), rows.argmax(-1).tolist() == choice


@pytest.mark.parametrize("kind", RECURRENT.split())
def test_choices_of_a_recurrent_model_are_scored_as_alone(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    assert not has_key_value_cache(model)
    judge = ChatTemplateLM(model, tiny_tokenizer, 2, BatchSharding(), positions=64)
    results = judge._loglikelihood_tokens(REQUESTS)
    for (_, context, choice), (log_likelihood, greedy) in zip(REQUESTS, results, strict=True):
        expected, is_greedy = alone(model, context, choice)
        assert log_likelihood == pytest.approx(expected, abs=1e-4) and greedy == is_greedy


def test_whole_sequences_score_as_a_cached_question_does(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    assert has_key_value_cache(model)
    cached = ChatTemplateLM(model, tiny_tokenizer, 2, BatchSharding(), positions=64)._loglikelihood_tokens(REQUESTS)
    whole = score_whole(model, [(context, choice) for _, context, choice in REQUESTS])
    for (one, greedy), (other, is_greedy) in zip(cached, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-5) and greedy == is_greedy
