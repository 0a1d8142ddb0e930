"""The gated FFN that keeps less, against transformers' own under autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cofitune.model.anatomy import anatomy_of
from cofitune.model.region import freeze_outside, resolve_region
from cofitune.training.engine import checkpoint_layers
from cofitune.training.loss import summed_loss
from cofitune.training.swiglu import MODEL_TYPES, keep_gate_and_up
from tests.training.test_activations import kept_bytes

NEURONS = 48
SMALL = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": NEURONS, "pad_token_id": 0, "hidden_act": "silu",
}  # fmt: skip
TOKENS = torch.arange(36).view(3, 12)
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS.clone()}


def small_model(family: str, modules: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Any:
    """A model of four small layers, of which the second and third train these modules."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL)).to(dtype)
    anatomy = anatomy_of(model)
    freeze_outside(model, set(resolve_region("1-2", modules, 4).parameter_names(anatomy)))
    return model


def gradients_of(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, what is its gradient by parameter, and the bytes that were kept for it."""
    with kept_bytes(model) as kept:
        loss = summed_loss(model, BATCH)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, kept[0]


@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_losses_and_gradients_have_the_same_bits_and_less_is_kept(family: str) -> None:
    plain, ours = small_model(family, ("up_proj", "down_proj")), small_model(family, ("up_proj", "down_proj"))
    assert keep_gate_and_up(ours, "model.layers", 1) == 3
    (loss, gradients, kept), (own_loss, own_gradients, own_kept) = gradients_of(plain), gradients_of(ours)
    assert torch.equal(loss, own_loss) and gradients.keys() == own_gradients.keys()
    assert all(torch.equal(gradients[name], own_gradients[name]) for name in gradients)
    above = 2  # layers below which something trains
    assert kept - own_kept == above * TOKENS.numel() * NEURONS * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modules", [("all",), ("gate_proj",), ("q_proj",)], ids="-".join)
def test_whatever_trains_the_gradients_are_autograds(modules: tuple[str, ...], dtype: torch.dtype) -> None:
    plain, ours = small_model("llama", modules, dtype), small_model("llama", modules, dtype)
    keep_gate_and_up(ours, "model.layers", 1)
    (loss, gradients, _), (own_loss, own_gradients, _) = gradients_of(plain), gradients_of(ours)
    assert torch.equal(loss, own_loss)
    assert all(torch.equal(gradients[name], own_gradients[name]) for name in gradients)


def test_layers_that_are_computed_again_are_left_as_they_are() -> None:
    model = small_model("llama", ("up_proj", "down_proj"))
    checkpoint_layers(model, "model.layers", 1, 2)
    assert keep_gate_and_up(model, "model.layers", 3) == 1
    assert ["forward" in vars(layer.mlp) for layer in model.model.layers] == [False, False, False, True]


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "phi3"])
def test_other_ffns_stay_as_they_are(family: str) -> None:
    small = {} if family == "gpt2" else {"intermediate_size": 48}
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **small))
    assert keep_gate_and_up(model, "transformer.h" if family == "gpt2" else "model.layers", 0) == 0


@pytest.mark.parametrize(("stage", "numbers"), [(2, 5760), (3, 8448)])
def test_a_frozen_layer_of_the_demos_model_keeps_5760_numbers_a_token(
    stage: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an attention mask, which repeats grouped keys and values, and autograd's own SiLU it were 8064.

    The linear layers that stage 3 puts in place keep their inputs, too: two of the hidden size and the neurons.
    """
    if stage == 3:
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    ids = torch.arange(32)[None]
    found = []
    for depth in (2, 3):
        config.num_hidden_layers = depth
        model = AutoModelForCausalLM.from_config(config)
        anatomy = anatomy_of(model)
        freeze_outside(model, set(resolve_region("0", ("up_proj", "down_proj"), depth).parameter_names(anatomy)))
        keep_gate_and_up(model, "model.layers", 0)
        with kept_bytes(model) as kept:
            summed_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
        found.append(kept[0])
    norms_and_softmax = 2 + 9  # a number each, for norms and for heads
    assert (found[1] - found[0]) / ids.numel() / 4 == numbers + norms_and_softmax
