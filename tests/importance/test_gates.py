"""The gates: they see what they claim to see, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.errors import UserError
from cofitune.importance.gates import seeded_dropout, virtual_gates
from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS

CPU = torch.device("cpu")


def tiny_llama(attn_implementation: str = "sdpa", **changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.15,
        attn_implementation=attn_implementation,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
        for m in model.modules()
    ]
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [getattr(m, "attention_dropout", None) for m in model.modules()],
        hooks,
    )


def test_gates_have_a_row_a_sample_and_are_all_that_requires_grad(model: Any, batch: Any) -> None:
    with virtual_gates(model, 0.1) as gates:
        made = gates.renew(3)
        assert {k: [tuple(g.shape) for g in v] for k, v in made.items()} == {
            ATTENTION_HEADS: [(3, 4)] * 3,
            FFN_NEURONS: [(3, 48)] * 3,
            FFN_OUTPUTS: [(3, 32)] * 3,
        }
        assert all(
            g.dtype == torch.float32 and g.requires_grad and bool((g == 1).all()) for v in made.values() for g in v
        )
        assert not any(p.requires_grad for p in model.parameters())


def test_gates_of_one_change_nothing(model: Any, batch: Any) -> None:
    model.eval()
    expected = model(**batch).logits
    with virtual_gates(model, 0.0) as gates:
        gates.renew(3)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("kind", "module", "cut"),
    [
        (ATTENTION_HEADS, "self_attn.o_proj", (slice(None), slice(16, 24))),
        (FFN_NEURONS, "mlp.down_proj", (slice(None), slice(2, 3))),
        (FFN_OUTPUTS, "mlp.down_proj", (slice(2, 3), slice(None))),
    ],
)
def test_a_gate_of_zero_is_its_unit_cut_out_of_the_weights(
    model: Any, batch: Any, kind: str, module: str, cut: tuple[slice, slice]
) -> None:
    """Gate 2 of layer 1 closed = the unit's columns (what it feeds) or rows (what it writes) of the weight zeroed."""
    with virtual_gates(model, 0.0) as gates, torch.no_grad():
        gates.renew(3)[kind][1][:, 2] = 0
        gated = model(**batch).logits
    untouched = model.eval()(**batch).logits
    with torch.no_grad():
        model.model.layers[1].get_submodule(module).weight[cut] = 0
        without = model(**batch).logits
    assert not torch.allclose(untouched, without, atol=1e-4)
    torch.testing.assert_close(gated, without, rtol=1e-4, atol=1e-5)


def test_per_sample_gates_sum_to_the_whole_gates_gradient(model: Any, batch: Any) -> None:
    """The gradient of a sample's row is what the sample gives alone; the batch's is their sum."""

    def gradients(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        leaves = [g for kind in gates.renew(len(ids)).values() for g in kind]
        logits = model(input_ids=ids, attention_mask=mask).logits
        return list(torch.autograd.grad((logits.square() * mask[..., None]).sum(), leaves))

    with virtual_gates(model, 0.0) as gates:
        together = gradients(batch["input_ids"], batch["attention_mask"])
        alone = [gradients(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1]) for i in range(3)]
    for number, whole in enumerate(together):
        torch.testing.assert_close(whole, torch.cat([a[number] for a in alone]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            whole.sum(0), torch.stack([a[number][0] for a in alone]).sum(0), rtol=1e-4, atol=1e-4
        )


def test_gate_gradients_of_a_bf16_model_are_summed_in_fp32(batch: Any) -> None:
    model = tiny_llama().bfloat16()
    captured: list[torch.Tensor] = []
    with virtual_gates(model, 0.0) as gates:
        leaf = gates.renew(3)[FFN_OUTPUTS][2]
        handle = model.model.norm.register_forward_pre_hook(lambda m, inputs: captured.append(inputs[0]))
        down: list[torch.Tensor] = []
        other = model.model.layers[2].mlp.down_proj.register_forward_hook(lambda m, i, o: down.append(o), prepend=True)
        loss = model(**batch).logits.float().square().sum()
        gradient, upstream = torch.autograd.grad(loss, [leaf, captured[0]])
        handle.remove()
        other.remove()
    torch.testing.assert_close(gradient, (upstream.float() * down[0].float()).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(model: Any, batch: Any, fails: bool) -> None:
    model.train()
    model.model.layers[0].mlp.eval()
    model.lm_head.weight.requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.attention_dropout = 0.1 * index
    before = snapshot(model)
    try:
        with virtual_gates(model, 0.3) as gates:
            gates.renew(3)
            model(**batch).logits.sum().backward()
            assert snapshot(model) != before
            if fails:
                raise RuntimeError("on purpose")
    except RuntimeError as error:
        assert str(error) == "on purpose"
    assert snapshot(model) == before
    assert gates.current == {}


def test_only_the_methods_dropout_is_active(model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """p reaches the attention kernel and the FFN's output of each layer once; a dropout of the model's own sleeps."""
    model.train()
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.5))
    model.gradient_checkpointing_enable()
    calls: list[tuple[str, float]] = []
    attention, dropout = nn.functional.scaled_dot_product_attention, nn.functional.dropout

    def spy_attention(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(("attention", named["dropout_p"]))
        return attention(*arguments, **named)

    def spy_dropout(value: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training:
            calls.append(("output", p))
        return dropout(value, p, training, inplace)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy_attention)
    monkeypatch.setattr(nn.functional, "dropout", spy_dropout)
    with virtual_gates(model, 0.25) as gates:
        gates.renew(3)
        model(**batch)
        awake = [module for module in model.modules() if module.training]
    assert awake == [layer.self_attn for layer in model.model.layers]  # without their children
    assert calls == [("attention", 0.25), ("output", 0.25)] * 3


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_dropout_reaches_the_probabilities(kernel: str, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the FFN's dropout held off, two seeds still give different logits, and one seed the same."""
    model = tiny_llama(kernel)

    def logits(seed: int) -> torch.Tensor:
        with virtual_gates(model, 0.3) as gates, seeded_dropout(seed, 0, 0, CPU), torch.no_grad():
            gates.renew(3)
            for layer in model.model.layers:
                layer.mlp.down_proj.register_forward_hook(lambda m, i, o: torch.zeros_like(o))
            return model(**batch).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_masks_depend_on_seed_micro_batch_and_pass_only() -> None:
    def draw(seed: int, micro_batch: int, pass_index: int) -> torch.Tensor:
        torch.rand(3)  # a global generator in any state
        with seeded_dropout(seed, micro_batch, pass_index, CPU):
            return torch.rand(4)

    assert torch.equal(draw(1, 2, 0), draw(1, 2, 0))
    draws = [draw(s, m, p) for s in (1, 2, 12) for m in (0, 1, 21) for p in (0, 1)]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    with seeded_dropout(1, 0, 0, CPU):
        torch.rand(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_without_a_dropout_to_set_is_refused(model: Any) -> None:
    del model.model.layers[1].self_attn.attention_dropout
    with pytest.raises(UserError, match="attention_dropout"), virtual_gates(model, 0.1):
        pass


def test_a_kernel_that_ignores_dropout_is_refused(model: Any) -> None:
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="flex_attention"), virtual_gates(model, 0.1):
        pass
    with virtual_gates(model, 0.0) as gates:  # fisher drops nothing
        assert gates.renew(1)
