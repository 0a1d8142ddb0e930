"""Rows that leave a batch early, against `generate` on each row alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from cofitune.model import decode
from cofitune.model.decode import generate_rows

PAD, END = 0, 1
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 24, "max_position_embeddings": 128, "initializer_range": 0.4,
    "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip


def build(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = kind(config).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=END, pad_token_id=PAD)
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(LlamaForCausalLM, LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def mistral() -> Any:
    return build(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6))


def batch() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    prompts = [[2 + (7 * n + 3 * i) % 22 for i in range(2 + n % 5)] for n in range(12)]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask, prompts


def upto(row: list[int]) -> list[int]:
    return row[: row.index(END) + 1] if END in row else row


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("at_once", [1, 4, 16])
def test_each_row_is_continued_as_if_it_stood_alone(
    name: str, at_once: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(name)
    ids, mask, prompts = batch()
    alone = [model.generate(input_ids=torch.tensor([p]), max_new_tokens=20)[0, len(p) :].tolist() for p in prompts]
    lengths = {len(upto(row)) for row in alone}
    assert len(lengths) > 2 and 20 in lengths, "some end early, some never"
    monkeypatch.setattr(decode, "TOKENS_AT_ONCE", at_once)
    seen: list[list[int]] = []
    rows = generate_rows(model, ids, mask, 20, lambda new: END in new, on_rows=lambda r: seen.append(list(r)))
    assert [upto(row) for row in rows] == [upto(row) for row in alone]
    assert all(set(after) < set(before) or after == before for before, after in pairwise(seen))
    assert len(seen) == -(-20 // at_once) and len(seen[-1]) < len(prompts)


def test_a_model_with_a_recurrent_state_keeps_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen3NextConfig(
        **{**SIZES, "num_hidden_layers": 4}, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=2, num_experts=0,
    )  # fmt: skip
    model = build(Qwen3NextForCausalLM, config)
    seen: list[list[int]] = []
    monkeypatch.setattr(decode, "TOKENS_AT_ONCE", 2)
    ids, mask, prompts = batch()
    generate_rows(model, ids, mask, 6, lambda new: END in new, on_rows=lambda r: seen.append(list(r)))
    assert seen == [list(range(len(prompts)))]


def test_nothing_is_left_to_do_when_all_rows_have_ended(llama: Any) -> None:
    ids, mask, _ = batch()
    seen: list[list[int]] = []
    rows = generate_rows(llama, ids, mask, 40, lambda new: True, on_rows=lambda r: seen.append(list(r)))
    assert len(seen) == 1 and all(len(row) == decode.TOKENS_AT_ONCE for row in rows)
