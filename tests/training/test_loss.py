"""The rehearsal's loss, against the obvious one: whole distributions in float64, every item alone, every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.data.batches import Plan, RehearsalMix, collate, rank_micro_batches
from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import join
from cofitune.data.top_k import TopK
from cofitune.training.loss import kl_from_base, rehearsal_loss, summed_loss, top_k_of

VOCAB, TOKENS = 50, 40


def random_logits(seed: int, spread: float = 2.0) -> Tensor:
    """float32 [TOKENS, VOCAB]."""
    return spread * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed))


def full_kl(base: Tensor, model: Tensor) -> Tensor:
    """KL(base ‖ model) over the whole vocabulary, entry by entry, in float64."""
    p, q = base.double().softmax(-1), model.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def kl_of_classes(base: TopK, model: Tensor) -> Tensor:
    """The KL over k + 1 classes in float64: each class's probability is the sum of its entries."""
    q = model.double().softmax(-1)
    losses = []
    for row in range(len(base)):
        chosen = base.indices[row].long()
        others = torch.ones(model.shape[-1], dtype=torch.bool)
        others[chosen] = False
        p = base.log_probs[row].double().exp()
        loss = (p * (p / q[row, chosen]).log()).sum()
        if others.any():
            p_rest = base.rest[row].double().exp()
            loss = loss + p_rest * (p_rest / q[row, others].sum()).log()
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("k", [1, 5, 32, VOCAB, VOCAB + 7])
def test_the_stored_classes_are_the_likeliest_and_sum_to_1(k: int) -> None:
    logits = random_logits(0)
    stored = top_k_of(logits, k)
    kept = min(k, VOCAB)
    assert stored.indices.shape == stored.log_probs.shape == (TOKENS, kept) and stored.indices.dtype == torch.int32
    p = logits.double().softmax(-1)
    expected, order = p.sort(-1, descending=True)
    assert torch.equal(stored.indices.long(), order[:, :kept])
    torch.testing.assert_close(stored.log_probs.double(), expected[:, :kept].log(), rtol=1e-5, atol=1e-5)
    if kept == VOCAB:
        assert (stored.rest == -torch.inf).all()
    else:
        torch.testing.assert_close(stored.rest.double(), expected[:, kept:].sum(-1).log(), rtol=1e-5, atol=1e-5)
    whole = stored.log_probs.double().exp().sum(-1) + stored.rest.double().exp()
    torch.testing.assert_close(whole, torch.ones(TOKENS, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_rest_of_next_to_nothing_is_stored_exactly() -> None:
    """It is summed from its own entries, not as what is missing to 1."""
    logits = random_logits(0)
    logits[:, 7] += 60
    rest = logits.double().softmax(-1).index_fill(-1, torch.tensor([7]), 0).sum(-1).log()
    assert (rest < -40).all()
    torch.testing.assert_close(top_k_of(logits, 1).rest.double(), rest, rtol=1e-6, atol=1e-5)


def test_the_kl_over_all_entries_is_the_full_kl() -> None:
    base, model = random_logits(1), random_logits(2)
    got = kl_from_base(model, top_k_of(base, VOCAB))
    torch.testing.assert_close(got.double(), full_kl(base, model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_the_kl_is_never_above_the_full_one_and_nears_it_with_k(spread: float) -> None:
    base, model = random_logits(1, spread), random_logits(2, spread)
    full = full_kl(base, model)
    before = torch.full((TOKENS,), torch.inf, dtype=torch.float64)
    for k in (1, 2, 4, 8, 16, 32, 49, 50):
        off = full - kl_from_base(model, top_k_of(base, k)).double()
        assert (off >= -1e-5).all()
        assert (off <= before + 1e-5).all(), "a finer division of the same classes"
        before = off
    assert (before.abs() <= 1e-5 * (1 + full)).all()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_what_the_kl_lacks_is_the_divergence_inside_of_the_rest(k: int) -> None:
    base, model = random_logits(1), random_logits(2)
    stored = top_k_of(base, k)
    off = full_kl(base, model) - kl_from_base(model, stored).double()
    others = torch.ones(TOKENS, VOCAB, dtype=torch.bool).scatter(-1, stored.indices.long(), False)
    inside = [full_kl(b[o], m[o]) for b, m, o in zip(base, model, others, strict=True)]
    expected = stored.rest.double().exp() * torch.stack(inside)
    torch.testing.assert_close(off, expected, rtol=1e-4, atol=1e-5)


def test_the_kl_of_a_model_from_itself_is_0_and_so_is_its_gradient() -> None:
    logits = random_logits(1).requires_grad_()
    kl = kl_from_base(logits, top_k_of(logits.detach(), 8))
    kl.sum().backward()
    assert kl.abs().max() <= 1e-6
    assert logits.grad is not None and logits.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 8, 49, VOCAB])
@pytest.mark.parametrize("confidence", [0.0, 5.0, 10.0, 15.0, 30.0, 80.0])
def test_the_kl_and_its_gradient_are_the_obvious_ones(k: int, confidence: float) -> None:
    """Also where the model has next to nothing left for the base's rest: there the push back is strongest."""
    stored = top_k_of(random_logits(1), k)
    logits = random_logits(2)
    logits.scatter_add_(-1, stored.indices.long(), torch.full(stored.indices.shape, confidence))
    logits.requires_grad_()
    expected = kl_of_classes(stored, logits)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    got = kl_from_base(logits, stored)
    (got_gradient,) = torch.autograd.grad(got.sum(), logits)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(got_gradient).all()
    assert (got_gradient - gradient).norm(dim=-1).max() <= 1e-5 * (1 + gradient.norm(dim=-1).max())


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def answers(kind: str) -> list[Example]:
    """Six of the base's answers, of unequal length; under kl with what is stored of it."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (9, 4, 12, 7, 11, 5):
        ids, prompt = torch.randint(0, VOCAB, (length,), generator=generator).tolist(), 2
        stored = top_k_of(torch.randn(length - prompt, VOCAB, generator=generator), 6) if kind == "kl" else None
        made.append(Example(ids, [IGNORED] * prompt + ids[prompt:], top_k=stored))
    return made


def obvious(model: LlamaForCausalLM, made: Sequence[Example]) -> Tensor:
    """The rehearsal's loss, every answer passed on its own."""
    total = torch.zeros((), dtype=torch.float64)
    for example in made:
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double()
        targets = torch.tensor(example.labels[1:])
        logits, targets = logits[targets != IGNORED], targets[targets != IGNORED]
        if example.top_k is None:
            total = total - logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()
        else:
            total = total + kl_of_classes(example.top_k, logits).sum()
    return total


def gradient_of(loss: Tensor, model: LlamaForCausalLM) -> Tensor:
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("kind", ["nll", "kl"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4, 5), (3,), (5, 4, 1)], ids=["all", "one", "some"])
def test_the_rehearsals_loss_is_that_of_each_answer_alone(kind: str, packed: bool, chosen: tuple[int, ...]) -> None:
    model, made = tiny_model(), [answers(kind)[i] for i in chosen]
    rows = [join(made[:2]), join(made[2:])] if packed and len(made) > 2 else [join(made)] if packed else made
    expected = obvious(model, made)
    got = rehearsal_loss(model, collate(rows, 0), kind)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = gradient_of(expected, model)
    assert (gradient_of(got, model) - gradient).norm() <= 1e-5 * gradient.norm()


def test_of_its_own_probabilities_a_model_has_no_kl_to_learn_from() -> None:
    model, made = tiny_model(), []
    for example in answers("nll"):
        with torch.no_grad():
            stored = top_k_of(model(torch.tensor([example.input_ids])).logits[0, 1:-1], 6)
        made.append(replace(example, top_k=stored))
    loss = rehearsal_loss(model, collate(made, 0), "kl")
    assert abs(loss.item()) <= 1e-4 and gradient_of(loss, model).norm() <= 1e-4
    assert rehearsal_loss(model, collate(answers("kl"), 0), "kl") > 1


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_a_silent_row_adds_nothing_and_runs_both_ways(kind: str) -> None:
    """A rank without an answer in a micro-batch."""
    model, made = tiny_model(), answers(kind)
    plan = Plan(1, 1, 2, 5, 1, rehearsal=RehearsalMix(5, 1, 0.2))
    first, silent = (rank_micro_batches(made, [0, 1, 5], plan, rank, 0)[1] for rank in range(2))
    assert "top_k_rest" not in silent and (silent["labels"] == IGNORED).all()
    loss = rehearsal_loss(model, silent, kind)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert rehearsal_loss(model, first, kind).item() > 0


def test_by_nll_an_answer_is_learnt_as_an_item_of_the_task_is() -> None:
    model, batch = tiny_model(), collate(answers("nll"), 0)
    assert torch.equal(rehearsal_loss(model, batch, "nll"), summed_loss(model, batch))
