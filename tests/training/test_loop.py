"""The loss, against the obvious one: every item alone, every position, a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cofitune.data.batches import collate
from cofitune.data.chat import IGNORED, Example
from cofitune.training.engine import checkpoint_layers
from cofitune.training.loss import summed_loss

EXAMPLES = [Example([1, 2, 3, 4, 5], [IGNORED] * 3 + [4, 5]), Example([6, 7, 8], [IGNORED, 7, IGNORED])]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def _obvious(model: Any) -> torch.Tensor:
    total = torch.zeros(())
    for example in EXAMPLES:
        log_probabilities = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(example.labels[1:]):
            if label != IGNORED:
                total = total - log_probabilities[position, label]
    return total


def test_the_loss_is_the_sum_over_supervised_tokens_alone(model: LlamaForCausalLM) -> None:
    torch.testing.assert_close(summed_loss(model, collate(EXAMPLES, 0)), _obvious(model))


def test_a_model_whose_head_is_no_module_gives_the_same(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(summed_loss(model, collate(EXAMPLES, 0)), _obvious(model))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere"])
def test_the_head_sees_supervised_positions_alone_and_the_rest_stays(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft capping (Gemma 2) and scaling (Granite, Cohere) of the logits come after the head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    other = {"granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3}}.get(kind, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **other)).eval()
    seen: list[tuple[int, ...]] = []
    real, weight = torch.nn.functional.linear, model.get_output_embeddings().weight

    def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if w.data_ptr() == weight.data_ptr():
            seen.append(tuple(x.shape))
        return real(x, w, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    loss = summed_loss(model, collate(EXAMPLES, 0))
    assert seen == [(3, 16)]
    monkeypatch.undo()
    torch.testing.assert_close(loss, _obvious(model))


def test_a_batch_without_supervised_tokens_gives_0_and_a_gradient_of_0(model: LlamaForCausalLM) -> None:
    silent = [Example(e.input_ids, [IGNORED] * len(e.input_ids)) for e in EXAMPLES]
    loss = summed_loss(model, collate(silent, 0))
    loss.backward()
    assert loss.item() == 0
    assert model.lm_head.weight.grad is not None and not model.lm_head.weight.grad.any()


def test_the_backward_pass_stops_at_the_lowest_trained_layer(model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.up_proj" in name)
    checkpoint_layers(model, "model.layers", first_trained=1)
    model.train()
    asked: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _i, out, index=index: asked.append(index) if out.requires_grad else None)
    summed_loss(model, collate(EXAMPLES, 0)).backward()
    assert set(asked) == {1, 2}
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True, True]
