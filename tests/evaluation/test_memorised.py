"""A model that has learned its items answers them all right, whatever the chat template writes around an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.data.chat import IGNORED, Example, encode_item
from cofitune.data.read import Item
from cofitune.data.shared_beginning import SharedBeginning, collate_shared
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.score import ScoreRequest, score_model
from cofitune.evaluation.tasks import load_tasks
from tests.data.published import TABLE, Published

ANSWERS = (
    "Paris", "Rome", "(A)", "B", "No.", "Yes, it is.", "4", "42", '"q"', "漢字", "é", "the court", "void", "- a",
    "<b>", "line one\nline two", "think", "C)", "[x]", "two words",
)  # fmt: skip


def memorise(model: Any, tokenizer: Any, steps: int = 400) -> None:
    """Train on every item in every step, until each learned token is the likeliest by far."""
    items = [Item((("user", f"Item {n}?"), ("assistant", answer)), f"f:{n}") for n, answer in enumerate(ANSWERS)]
    examples = [example for item in items for example in encode_item(item, tokenizer).examples]
    inputs, before, learned = in_one_row(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.8, 0.95), weight_decay=0.0, fused=True)
    for _ in range(steps):
        logits = model.lm_head(model.model(**inputs).last_hidden_state[0, before])  # where something is learned alone
        chances = logits.log_softmax(-1).gather(-1, learned[:, None])
        loss = -chances.mean()
        if chances.min() > math.log(0.6):  # a mean would hide an item
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    raise AssertionError(f"not memorised: loss {float(loss):g}")


def in_one_row(examples: Sequence[Example]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """What the examples have in common is read once: a third of the tokens of a batch, and the same loss.

    Returns:
        What the model reads; the places that predict a learned token; these tokens.
    """
    shared = SharedBeginning.of(examples, range(len(examples)))
    batch = collate_shared([shared])
    names, labels = batch["names"][0], batch["labels"][0]
    places = torch.arange(len(names))
    own = (names[:, None] == names) | (places < len(shared.ids))
    hidden = torch.zeros(own.shape).masked_fill(~own | (places > places[:, None]), torch.finfo(torch.float32).min)
    predicted = places[labels != IGNORED]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    return {**inputs, "attention_mask": hidden[None, None], "use_cache": False}, predicted - 1, labels[predicted]


@pytest.mark.parametrize("published", TABLE, ids=lambda one: one.title)
def test_all_that_was_memorised_is_answered(tmp_path: Path, published: Published) -> None:
    tokenizer = published.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    memorise(model, tokenizer)
    model.eval()
    others = [*ANSWERS[1:], ANSWERS[0]]
    files: dict[str, list[dict[str, Any]]] = {
        "g": [{"question": f"Item {n}?", "answer": a} for n, a in enumerate(ANSWERS)],
        "c": [
            {"question": f"Item {n}?", "choices": [other, answer], "answer": 1}
            for n, (answer, other) in enumerate(zip(ANSWERS, others, strict=True))
        ],
        "l": [{"instruction": f"Item {n}?", "output": a} for n, a in enumerate(ANSWERS)],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"g": ("generate", "exact_match"), "c": ("multiple_choice", "acc"), "l": ("loss", "nats_per_token")}
    tasks = load_tasks(
        EvalTask(name, "gen_kn", str(tmp_path / f"{name}.jsonl"), *kind, max_new_tokens=24)
        for name, kind in kinds.items()
    )
    result = score_model(model, ScoreRequest(tokenizer, tasks, 8))
    assert [(s.reference, s.answer) for s in result["g"].samples if not s.score] == []
    assert result["g"].raw == 1 and result["c"].raw == 1
    assert result["l"].raw < 0.5, "an untrained one has 6"
