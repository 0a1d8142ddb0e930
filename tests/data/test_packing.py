"""Packing: every item is in one pack, packs are nearly full, and a pack is to the model what its items are alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cofitune.data.batches import Plan, collate, count_supervised, rank_micro_batches
from cofitune.data.chat import IGNORED, Example
from cofitune.data.encoded import SCHEMA, Examples
from cofitune.data.packing import Packs, join, pack_lengths
from cofitune.model.packing import refuses_packing
from cofitune.training.engine import checkpoint_layers
from cofitune.training.loss import summed_loss


def some_examples(seed: int = 0, count: int = 9, longest: int = 20) -> list[Example]:
    """Random items whose very first label is set too, as `train_on: all` sets it."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = int(torch.randint(2, longest, (1,), generator=generator))
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        prompt = 0 if number % 3 == 0 else length // 2
        examples.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return examples


def as_table(examples: list[Example]) -> Examples:
    columns = [[e.input_ids for e in examples], [[label != IGNORED for label in e.labels] for e in examples]]
    columns.append([True] * len(examples))
    return Examples(pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA))


@pytest.mark.parametrize("seed", range(20))
def test_every_item_is_in_one_pack_and_no_pack_is_too_long(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(8, 600))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 400)))
    packs = pack_lengths(lengths, capacity)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= capacity for pack in packs)
    assert all(a < b for pack in packs for a, b in pairwise(pack.tolist()))
    fewest = int(np.ceil(lengths.sum() / capacity))
    assert len(packs) <= 11 / 9 * max(fewest, int((2 * lengths > capacity).sum())) + 1
    assert all(np.array_equal(a, b) for a, b in zip(packs, pack_lengths(lengths, capacity), strict=True))


def test_each_item_goes_where_it_fits_best() -> None:
    """By hand, of 10: 7, 6 and 5 open packs with 3, 4 and 5 left; 4 fills the second, 3 the first, 2 the third."""
    packs = pack_lengths(np.array([2, 3, 4, 5, 6, 7]), 10)
    assert sorted(pack.tolist() for pack in packs) == [[0, 3], [1, 5], [2, 4]]


def test_a_pack_is_read_as_one_example_with_its_parts() -> None:
    examples = some_examples()
    packs = Packs(as_table(examples), pack_lengths(np.array([len(e.input_ids) for e in examples]), 40))
    assert sum(len(p.parts) for p in packs) == len(examples)
    for number, pack in enumerate(packs):
        assert len(pack.input_ids) == sum(pack.parts) == packs.lengths[number] <= 40
        starts = np.cumsum([0, *pack.parts[:-1]])
        assert all(pack.labels[start] == IGNORED for start in starts), "no item is predicted from the one before it"
    assert sum(p.num_supervised for p in packs) == sum(e.num_supervised for e in examples)
    assert join([packs[0], packs[1]]).parts == packs[0].parts + packs[1].parts
    assert packs[0:2] == [packs[0], packs[1]]


def tiny(model_type: str, **more: Any) -> Any:
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


WINDOW = {"sliding_window": 7}  # shorter than the items
MODELS: dict[str, dict[str, int]] = {
    "llama": {}, "mistral": WINDOW, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": WINDOW, "gemma3_text": WINDOW,
    "olmo": {}, "olmo2": {}, "smollm3": {}, "granite": {},
}  # fmt: skip
CASES = [(name, kind) for name in MODELS for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")]


def loss_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """Summed over the batches, each passed on its own."""
    model.zero_grad()
    losses = [summed_loss(model, batch) for batch in batches]
    torch.stack(losses).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return sum(loss.item() for loss in losses), torch.cat(gradients)


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_packs_have_the_loss_and_gradients_of_their_items_alone(model_type: str, attention: str) -> None:
    model = tiny(model_type, **MODELS[model_type])
    model.set_attn_implementation(attention)
    model.train()
    assert refuses_packing(model.config, flash=False) is None
    examples = some_examples()
    expected, gradients = loss_and_gradients(model, [collate([e], 0) for e in examples])
    packs = [join(examples[:4]), join(examples[4:6]), join(examples[6:])]  # of unequal lengths, so that two are padded
    batch = collate(packs, 0)
    assert batch["input_ids"].shape[0] == 3 and not batch["attention_mask"].all()
    assert count_supervised(batch) == sum(e.num_supervised for e in examples)
    for batches in ([batch], [collate([join(packs)], 0)]):  # padded rows, and flat as for FlashAttention
        loss, packed = loss_and_gradients(model, batches)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert (packed - gradients).norm() <= 1e-5 * gradients.norm()


def test_packs_stay_apart_under_activation_checkpointing() -> None:
    model = tiny("llama")
    model.train()
    examples = some_examples(1)
    batch = collate([join(examples[:5]), join(examples[5:])], 0)
    expected, gradients = loss_and_gradients(model, [collate([e], 0) for e in examples])
    checkpoint_layers(model, "model.layers", 0)
    loss, packed = loss_and_gradients(model, [batch])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (packed - gradients).norm() <= 1e-5 * gradients.norm()


def test_what_is_compared_would_show_a_leak() -> None:
    """Without positions that begin again, the same pack has another loss: the test above can fail."""
    model = tiny("llama").eval()
    examples = some_examples(1)
    expected, _ = loss_and_gradients(model, [collate([e], 0) for e in examples])
    pack = join(examples)
    loss, _ = loss_and_gradients(model, [collate([Example(pack.input_ids, pack.labels)], 0)])
    assert abs(loss - expected) > 1e-3 * expected


def test_a_flat_plan_lays_a_micro_batch_in_one_row() -> None:
    examples = [join(some_examples(seed, 3)) for seed in range(4)]
    for flat, rows in ((False, 2), (True, 1)):
        plan = Plan(2, 2, 1, 4, 1, flat=flat)
        batches = rank_micro_batches(examples, range(4), plan, 0, 0)
        assert [b["input_ids"].shape[0] for b in batches] == [rows, rows]
        assert sum(map(count_supervised, batches)) == sum(e.num_supervised for e in examples)
        assert sorted(i for b in batches for i in b["indices"].tolist()) == [0, 1, 2, 3]
        assert not flat or all(b["attention_mask"].all() for b in batches)
