"""Attention of packs by conversation: loss and gradients are those of the conversations alone, and of the masks.

Every family is tried in test_packing.py. torch's kernel needs a GPU; plain torch stands in for it here.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cofitune.data.batches import Batch, collate
from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import join
from cofitune.model.varlen import VARLEN, attend_by_conversation, conversations, knows_varlen, varlen_attention
from cofitune.training.engine import checkpoint_layers
from cofitune.training.loss import summed_loss
from tests import packs

LENGTHS = ((13, 7, 5), (9, 4))  # of the conversations of two packs, of which the second is padded
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
FLASH = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gpt2": {
        "vocab_size": 60,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


def make(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else SIZES), **KINDS[kind])
    return packs.build(config).train()


def conversations_made() -> list[list[Example]]:
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randint(1, 60, (n,), generator=generator).tolist() for n in pack] for pack in LENGTHS]
    return [[Example(ids, [IGNORED, *ids[1:]]) for ids in pack] for pack in rows]


def loss_and_gradient(model: PreTrainedModel, batches: list[Batch]) -> tuple[float, Tensor]:
    model.zero_grad()
    losses = [summed_loss(model, batch) for batch in batches]
    for loss in losses:
        loss.backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return sum(loss.item() for loss in losses), torch.cat(gradients)


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_conversations_alone(kind: str, flat: bool, checkpointed: int) -> None:
    model, made = make(kind), conversations_made()
    model.set_attn_implementation("sdpa")
    loss, gradient = loss_and_gradient(model, [collate([e], 0) for pack in made for e in pack])
    rows = [join(pack) for pack in made]
    batch = collate([join(rows)] if flat else rows, 0)
    masked_loss, masked_gradient = loss_and_gradient(model, [batch])
    attend_by_conversation(model)
    if checkpointed:  # what is computed again is told the bounds, too
        checkpoint_layers(model, "transformer.h" if kind == "gpt2" else "model.layers", 0, checkpointed)
    own_loss, own_gradient = loss_and_gradient(model, [batch])
    assert own_loss == pytest.approx(loss, rel=1e-6) and own_loss == pytest.approx(masked_loss, rel=1e-6)
    assert (own_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    assert (own_gradient - masked_gradient).norm() <= 1e-6 * gradient.norm()


def test_without_bounds_it_is_sdpa_to_the_bit() -> None:
    model = make("mistral").eval()
    batch = collate([pack[0] for pack in conversations_made()], 0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model.set_attn_implementation("sdpa")
    expected = model(**inputs).logits
    attend_by_conversation(model)
    assert torch.equal(model(**inputs).logits, expected)
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(said, model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_bounds_count_a_rows_padding_as_one() -> None:
    batch = collate([join(pack) for pack in conversations_made()], 0)
    assert batch["cu_seq_lens"].tolist() == [0, 13, 20, 25, 34, 38, 50]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert "cu_seq_lens" not in collate(conversations_made()[0], 0)


def test_a_mask_is_made_where_attention_cannot_be_told() -> None:
    model = make("llama")
    for kernel, told in (
        ("sdpa", set()),
        ("eager", set()),
        (VARLEN, {"attention_mask", *FLASH}),
        ("flash_attention_2", FLASH),
    ):
        model.config._attn_implementation_internal = kernel
        assert set(conversations(model, collate([join(conversations_made()[0])], 0))) == told


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("of_values", [8, 6])
def test_torchs_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, heads: int, window: int | None, of_values: int
) -> None:
    """A width of values of its own, as DeepSeek's, a window and grouped heads reach it as they should."""
    asked: dict[str, Any] = {}

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int, **options: Any
    ) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and longest == longest_k == 25 and bounds is bounds_k
        asked.update(options)
        return packs._cut(
            q, k, v, bounds, bounds, longest, longest, 0.0, options["scale"], True, options["window_size"]
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (heads, 8), (heads, of_values))
    query, key, value = (torch.randn(2, count, 25, width, generator=generator) for count, width in shapes)
    bounds = torch.tensor([0, 13, 20, 25, 34, 38, 50], dtype=torch.int32)
    module: Any = SimpleNamespace(num_key_value_groups=4 // heads, is_causal=True, training=False)
    options: dict[str, Any] = {"scaling": 0.4, "cu_seq_lens_q": bounds, "max_length_q": 25, "sliding_window": window}
    one_by_one, _ = varlen_attention(module, query, key, value, None, **options)
    assert not asked and one_by_one.shape == (2, 25, 4, of_values)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    by_kernel, _ = varlen_attention(module, query, key, value, None, **options)
    torch.testing.assert_close(by_kernel, one_by_one)
    assert asked == {"scale": 0.4, "window_size": (2, 0) if window else (-1, 0), "enable_gqa": heads == 2}
    asked.clear()
    plain: Any = SimpleNamespace(is_causal=True, training=False)
    wide = [torch.randn(2, 4, 25, 260, generator=generator) for _ in range(3)]
    varlen_attention(plain, wide[0], wide[1], wide[2], None, **options)
    assert not asked, "its heads are too wide for the kernel"
    varlen_attention(module, query, key, value, None, dropout=0.5, **options)
    assert not asked, "the kernel drops nothing"


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_kernel_is_told_of_a_shared_beginning(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Two rests behind one beginning: as FlashAttention has it, the last query of a part sees its last key."""

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int, **options: Any
    ) -> Tensor:
        results = []
        for (begin, end), (first, last) in zip(*(pairwise(b.tolist()) for b in (bounds, bounds_k)), strict=True):
            scores = torch.einsum("qad,kad->aqk", q[begin:end], k[first:last]) * options["scale"]
            own = torch.arange(last - first - (end - begin), last - first)
            distance = own[:, None] - torch.arange(last - first)
            left, right = options["window_size"]
            hidden = (distance < -right) | ((distance > left) if left >= 0 else False)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            results.append(torch.einsum("aqk,kad->qad", weights, v[first:last]))
        return torch.cat(results)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(3))
    module: Any = SimpleNamespace(is_causal=True, training=False)
    options: dict[str, Any] = {
        "scaling": 0.4,
        "max_length_q": 12,
        "sliding_window": window,
        "cu_seq_lens_q": torch.tensor([0, 5, 8, 12], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 5, 13, 22], dtype=torch.int32),
        "key_places": torch.tensor([*range(5), *range(8), *range(5), *range(8, 12)]),
    }
    one_by_one, _ = varlen_attention(module, query, key, value, None, **options)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    by_kernel, _ = varlen_attention(module, query, key, value, None, **options)
    torch.testing.assert_close(by_kernel, one_by_one)


def test_what_the_kernels_do_not_know_is_refused() -> None:
    row = torch.randn(1, 2, 4, 8)
    module: Any = SimpleNamespace(is_causal=True, training=False)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"does not know {name}"):
            unknown: dict[str, Any] = {name: torch.ones(2)}
            varlen_attention(module, row, row, row, None, cu_seq_lens_q=row, max_length_q=4, **unknown)


def test_who_attends_by_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = AutoConfig.for_model("llama")
    assert knows_varlen(llama, torch.float32)
    assert not knows_varlen(AutoConfig.for_model("gemma2"), torch.float32), "it caps its scores"
    assert not knows_varlen(AutoConfig.for_model("llama", attention_dropout=0.1), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, dtype, has in (
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((7, 5), torch.float16, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda is_=capability: is_)
        assert knows_varlen(llama, dtype) is has
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, is_causal: query)  # as of torch 2.10
    assert not knows_varlen(llama, torch.bfloat16)
