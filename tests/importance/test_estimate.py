"""Importance against a second, obvious implementation: a Llama written out by hand, its gates in the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.errors import UserError
from cofitune.importance.estimate import EstimatorSettings, estimate, memory_estimate
from cofitune.importance.gates import seeded_dropout, virtual_gates
from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, UNIT_KINDS
from cofitune.model.anatomy import anatomy_of

A, K, D, H, F, L, V = 4, 2, 8, 32, 48, 3, 64
THETA = 5000.0
P = 0.2
SEED = 5
CPU = torch.device("cpu")
Drop = Callable[[Tensor], Tensor]


def tiny_llama(attn_implementation: str = "eager") -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=H,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=A,
        num_key_value_heads=K,
        vocab_size=V,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation=attn_implementation,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def make_batch(seed: int, lengths: list[int], padding: int = 0) -> dict[str, Tensor]:
    width = max(lengths) + padding
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(100 * seed + row))
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


BATCHES = [make_batch(0, [5, 7]), make_batch(1, [6, 3]), make_batch(2, [9])]


# The obvious implementation -------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on [B, heads, T, D]: each pair (x_i, x_{i + D/2}) turns by position · theta^(−2i/D)."""
    half = D // 2
    angle = torch.arange(x.shape[2])[:, None] * THETA ** (-2 * torch.arange(half) / D)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def attention(x: Tensor, w: Callable[[str], Tensor], mask: Tensor, gate: Tensor, drop: Drop) -> Tensor:
    batch, length, _ = x.shape

    def split(name: str, heads: int) -> Tensor:
        return (x @ w(f"self_attn.{name}_proj").T).reshape(batch, length, heads, D).transpose(1, 2)

    q, k, v = rotate(split("q", A)), rotate(split("k", K)), split("v", K)
    k, v = (torch.stack([t[:, h * K // A] for h in range(A)], 1) for t in (k, v))
    allowed = torch.ones(length, length).tril().bool() & mask.bool()[:, None, None, :]
    probabilities = (q @ k.transpose(2, 3) / D**0.5).masked_fill(~allowed, -1e30).softmax(-1)
    outputs = drop(probabilities) @ v
    heads = [outputs[:, h] * gate[h] for h in range(A)]
    return torch.cat(heads, -1) @ w("self_attn.o_proj").T


def forward(model: LlamaForCausalLM, batch: dict[str, Tensor], gates: dict[str, Tensor], drop: Drop) -> Tensor:
    """Logits [B, T, V]. Dropout is asked for in the model's own order: a layer's attention, then its FFN."""
    state, eps = model.state_dict(), model.config.rms_norm_eps
    x = state["model.embed_tokens.weight"][batch["input_ids"]]
    for i in range(L):

        def w(name: str, i: int = i) -> Tensor:
            return state[f"model.layers.{i}.{name}.weight"]

        normed = rms_norm(x, w("input_layernorm"), eps)
        x = x + attention(normed, w, batch["attention_mask"], gates[ATTENTION_HEADS][i], drop)
        normed = rms_norm(x, w("post_attention_layernorm"), eps)
        gate = normed @ w("mlp.gate_proj").T
        neurons = gate * gate.sigmoid() * ((normed @ w("mlp.up_proj").T) * gates[FFN_NEURONS][i])
        x = x + drop((neurons @ w("mlp.down_proj").T) * gates[FFN_OUTPUTS][i])
    return rms_norm(x, state["model.norm.weight"], eps) @ state["lm_head.weight"].T


def reference(
    model: LlamaForCausalLM, batch: dict[str, Tensor], run_pass: Callable[[int, Callable[[Drop], Tensor]], Tensor]
) -> dict[str, Tensor]:
    """∂/∂g of Σ_real tokens Σ_v p2 (log p2 − log p1), with one gate a unit for both passes and the whole batch."""
    gates = {k: torch.ones(L, n, requires_grad=True) for k, n in zip(UNIT_KINDS, (A, F, H), strict=True)}
    f1, f2 = (run_pass(i, lambda drop: forward(model, batch, gates, drop)) for i in (0, 1))
    p1, p2 = f1.softmax(-1), f2.softmax(-1)
    kl = (p2 * (p2.log() - p1.log())).sum(-1)
    loss = torch.stack([kl[b, t] for b, t in batch["attention_mask"].nonzero().tolist()]).sum()
    return dict(zip(UNIT_KINDS, torch.autograd.grad(loss, [gates[k] for k in UNIT_KINDS]), strict=True))


def fixed_mask(shape: torch.Size, call: int) -> Tensor:
    """A mask that depends on the place and the number of the call alone: a row's is the same however it is padded."""
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    wave = torch.stack([torch.sin((1.7 + axis) * place + 0.9 * call) for axis, place in enumerate(places)]).sum(0)
    return (wave > -1.2).float() / (1 - P)


class FixedDropout:
    """Stands in for `torch.nn.functional.dropout`; refuses a call that the method does not make."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if (p, training) != (P, True):
            raise AssertionError(f"dropout with p={p}, training={training}")
        self.calls += 1
        return value * fixed_mask(value.shape, self.calls)


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Layer by layer: the largest difference is at most `relative` of the layer's largest score."""
    assert results.keys() == expected.keys()
    for kind, want in expected.items():
        assert results[kind].shape == want.shape
        largest = want.abs().amax(-1)
        assert bool((largest > 1e-6).all()), "nothing to compare"
        difference = (results[kind].double() - want.double()).abs().amax(-1) / largest
        assert bool((difference <= relative).all()), f"{kind}: {difference.tolist()}"


# Tests ----------------------------------------------------------------------------------------------------------------


def test_the_hand_written_model_is_the_model() -> None:
    model = tiny_llama().eval()
    ones = {k: torch.ones(L, n) for k, n in zip(UNIT_KINDS, (A, F, H), strict=True)}
    mask = BATCHES[0]["attention_mask"].bool()
    by_hand = forward(model, BATCHES[0], ones, lambda x: x)
    torch.testing.assert_close(by_hand[mask], model(**BATCHES[0]).logits[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_scores_equal_brute_force_with_the_same_random_masks(kernel: str) -> None:
    model = tiny_llama(kernel)
    expected: dict[str, Tensor] = {}
    for index, batch in enumerate(BATCHES):

        def run_pass(number: int, run: Callable[[Drop], Tensor], index: int = index) -> Tensor:
            with seeded_dropout(SEED, index, number, CPU):
                return run(lambda x: nn.functional.dropout(x, P, True))

        for kind, value in reference(model, batch, run_pass).items():
            expected[kind] = expected.get(kind, 0) + value.double()
    tokens = 5 + 7 + 6 + 3 + 9
    scores = estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))
    assert scores.tokens == tokens
    assert_close(scores.values, {k: v / tokens for k, v in expected.items()}, 1e-5)


def test_draws_are_averaged_and_even_and_odd_micro_batches_kept_apart() -> None:
    model, draws = tiny_llama(), 3
    expected = {kind: torch.zeros(2, L, n).double() for kind, n in zip(UNIT_KINDS, (A, F, H), strict=True)}
    for index, batch in enumerate(BATCHES):
        for pair in range(draws):

            def run_pass(number: int, run: Callable[[Drop], Tensor], index: int = index, pair: int = pair) -> Tensor:
                with seeded_dropout(SEED, index, 2 * pair + number, CPU):
                    return run(lambda x: nn.functional.dropout(x, P, True))

            for kind, value in reference(model, batch, run_pass).items():
                expected[kind][index % 2] += value.double() / draws
    scores = estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED, pairs=draws))
    tokens = 5 + 7 + 6 + 3 + 9
    assert (scores.tokens, scores.micro_batches) == (tokens, 3)
    for half in (0, 1):
        found = {kind: scores.halves[kind][half] for kind in UNIT_KINDS}
        assert_close(found, {kind: value[half] / tokens for kind, value in expected.items()}, 1e-5)
    assert_close(scores.values, {kind: value.sum(0) / tokens for kind, value in expected.items()}, 1e-5)


def test_scores_equal_brute_force_with_given_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No random number at all: both implementations are handed the same masks, call by call."""
    model, batch, masks = tiny_llama(), BATCHES[0], FixedDropout()
    expected = reference(model, batch, lambda number, run: run(lambda x: masks(x, P, True)))
    assert masks.calls == 2 * L * 2
    monkeypatch.setattr(nn.functional, "dropout", FixedDropout())
    scores = estimate(model, [(0, batch)], EstimatorSettings(dropout=P, seed=SEED))
    assert_close(scores.values, {k: v / 12 for k, v in expected.items()}, 1e-5)


def test_the_order_of_the_micro_batches_does_not_matter() -> None:
    model = tiny_llama()
    forwards = estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))
    torch.rand(11)
    backwards = estimate(model, [(i, BATCHES[i]) for i in (2, 0, 1)], EstimatorSettings(dropout=P, seed=SEED))
    for kind in UNIT_KINDS:
        torch.testing.assert_close(forwards.values[kind], backwards.values[kind], rtol=1e-12, atol=1e-15)


def test_the_seed_and_the_index_choose_the_masks() -> None:
    model = tiny_llama()

    def heads(index: int, seed: int) -> Tensor:
        return estimate(model, [(index, BATCHES[0])], EstimatorSettings(dropout=P, seed=seed)).values[ATTENTION_HEADS]

    assert torch.equal(heads(0, 1), heads(0, 1))
    assert not torch.equal(heads(0, 1), heads(0, 2))
    assert not torch.equal(heads(0, 1), heads(1, 1))


def test_every_batch_counts_once() -> None:
    """A defect of the published code (docs/method.md): without fresh gates batch i of N counts N − i + 1 times."""
    model = tiny_llama()
    alone = [estimate(model, [(i, b)], EstimatorSettings(dropout=P, seed=SEED)) for i, b in enumerate(BATCHES)]
    together = estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))
    assert together.tokens == sum(a.tokens for a in alone)
    for kind in UNIT_KINDS:
        total = sum(a.values[kind] * a.tokens for a in alone)
        torch.testing.assert_close(together.values[kind] * together.tokens, total, rtol=1e-10, atol=1e-14)


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that depend on the place alone make a padded batch comparable with a bare one."""
    model = tiny_llama()
    results = []
    for padding in (0, 6):
        monkeypatch.setattr(nn.functional, "dropout", FixedDropout())
        results.append(estimate(model, [(0, make_batch(0, [5, 7], padding))], EstimatorSettings(dropout=P, seed=SEED)))
    assert results[0].tokens == results[1].tokens == 12
    assert_close(results[1].values, results[0].values, 1e-5)
    for kind in UNIT_KINDS:
        assert float((results[0].values[kind] - results[1].values[kind]).abs().max()) < 1e-6


def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_models_own_mode_and_dropout_do_not_matter() -> None:
    model = tiny_llama()
    expected = estimate(model.eval(), enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.7
    model.gradient_checkpointing_enable()
    result = estimate(model.train(), enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))
    assert all(torch.equal(result.values[k], expected.values[k]) for k in UNIT_KINDS)


def test_a_silent_layer_scores_zero_and_not_nan() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    scores = estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED)).values
    assert bool((scores[FFN_NEURONS][1] == 0).all()) and bool((scores[FFN_OUTPUTS][1] == 0).all())
    assert bool((scores[FFN_NEURONS][0] != 0).any())


def test_broken_weights_are_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="overflowed"):
        estimate(model, enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED))


def test_no_token_is_an_error() -> None:
    with pytest.raises(UserError, match="not one token"):
        estimate(tiny_llama(), [], EstimatorSettings(dropout=P, seed=SEED))


def test_progress_is_told_the_tokens_of_each_batch() -> None:
    messages: list[int] = []
    estimate(tiny_llama(), enumerate(BATCHES), EstimatorSettings(dropout=P, seed=SEED), on_batch=messages.append)
    assert messages == [12, 9, 9]


def test_the_memory_estimate_is_near_what_autograd_keeps() -> None:
    model: Any = tiny_llama("sdpa")
    batch = make_batch(0, [40, 40])
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with virtual_gates(model, P) as gates, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        gates.renew(2)
        held = [model(**batch).logits for _ in range(2)]
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    expected = memory_estimate(anatomy_of(model), 4, 2, 40)["activations"]
    assert len(held) == 2
    assert 0.6 < measured / expected < 1.05  # of three layers the lowest keeps little: nothing below it has a gate
