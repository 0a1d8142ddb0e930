"""The head and its loss in chunks, against whole logits and autograd; rows without an attention mask, against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cofitune.data.batches import Batch, collate
from cofitune.data.chat import IGNORED, Example
from cofitune.training import head_loss, loss
from cofitune.training.delta import collect
from cofitune.training.engine import EngineSettings, release, start_distributed, start_engine
from cofitune.training.head_loss import KNOWN_HEADS, chunked_head
from cofitune.training.loss import rehearsal_loss, summed_loss, supervised_logits, top_k_of

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2}
OTHER: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 4.0},
    "cohere": {"logit_scale": 0.3}, "cohere2": {"logit_scale": 0.3}, "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
}  # fmt: skip


SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.float32, micro_batch=4,
    accumulation=1, learning_rate=1e-2, weight_decay=0.0, adam_betas=(0.9, 0.95), adam_epsilon=1e-2, max_grad_norm=1.0,
    lr_scheduler_type="constant", warmup_ratio=0.0, num_steps=2,
)  # fmt: skip


def build(kind: str = "llama") -> PreTrainedModel:
    """A tiny model away from its first weights, so that biases and logits are no zeros."""
    sizes = dict(GPT2) if kind == "gpt2" else SIZES | OTHER.get(kind, {})
    if kind in ("gpt_neox", "starcoder2", "stablelm", "phi", "olmo", "olmo2", "cohere", "cohere2"):
        sizes = {k: v for k, v in sizes.items() if k != "head_dim"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    made: PreTrainedModel = model.eval()
    return made


def batch_of(kind: str, seed: int = 0) -> Batch:
    """Four rows of unequal length, padded on the right; under kl with a base's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (9, 4, 12, 7):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        stored = top_k_of(2 * torch.randn(length - 2, VOCAB, generator=generator), 5) if kind == "kl" else None
        rows.append(Example(ids, [IGNORED] * 2 + ids[2:], top_k=stored))
    return collate(rows, 0)


def value_and_gradients(model: PreTrainedModel, batch: Batch, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    value = rehearsal_loss(model, batch, kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(0.37 * value, list(trained.values()), allow_unused=True)
    return value.detach(), {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert got[1].keys() == expected[1].keys()
    whole = torch.cat([g.flatten() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-6 * whole, name


def freeze_head(model: PreTrainedModel) -> None:
    head: Any = model.get_output_embeddings()
    head.requires_grad_(False)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", ["nll", "kl"])
@pytest.mark.parametrize("family", sorted(KNOWN_HEADS))
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    family: str, kind: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(family), batch_of(kind)
    if frozen:
        freeze_head(model)
    assert chunked_head(model) is not None
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", 5 * VOCAB)
    got = value_and_gradients(model, batch, kind)
    monkeypatch.setattr(loss, "chunked_head", lambda model: None)
    assert_same(got, value_and_gradients(model, batch, kind))


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_a_bfloat16_heads_sums_are_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one model: chunks of a row each give what one chunk of all gives, weight and hidden states alike."""
    model, batch = build("gemma2").bfloat16(), batch_of(kind)
    whole = value_and_gradients(model, batch, kind)
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", VOCAB)
    one = value_and_gradients(model, batch, kind)
    torch.testing.assert_close(one[0], whole[0], rtol=1e-6, atol=0)
    assert one[0].dtype == torch.float32
    for name, gradient in whole[1].items():
        assert (one[1][name] - gradient).float().norm() <= 1e-2 * gradient.float().norm(), name


def test_nothing_of_the_logits_is_kept_for_the_backward_pass() -> None:
    model, batch = build(), batch_of("nll")
    freeze_head(model)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[-1] if tensor.dim() else 0)
        return tensor

    own = {id(p) for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t if id(t) in own else keep(t), lambda t: t):
        value = summed_loss(model, batch)
    assert kept and VOCAB not in kept
    value.backward()
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(model, batch), value.detach(), rtol=0, atol=0)


def test_the_model_is_left_as_it_was_found() -> None:
    model, batch = build(), batch_of("nll")
    before = model(batch["input_ids"]).logits
    summed_loss(model, batch)
    assert torch.equal(model(batch["input_ids"]).logits, before)
    assert supervised_logits(model, batch)[0].shape[1] == VOCAB


def test_a_model_of_unknown_code_keeps_its_logits_and_its_mask() -> None:
    class Own(type(build())):  # type: ignore[misc]
        pass

    model = Own(build().config)
    model.load_state_dict(build().state_dict())
    seen: list[Any] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = batch_of("nll")
    torch.testing.assert_close(summed_loss(model, batch), summed_loss(build(), batch), rtol=1e-6, atol=0)
    assert seen[0] is not None and chunked_head(model) is None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_trained_head_takes_the_same_steps_under_deepspeed(
    stage: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied))
        engine = start_engine(model, replace(SETTINGS, zero_stage=stage))
        for step in range(2):
            engine.backward(summed_loss(engine, batch_of("nll", step)) / 20)
            engine.step()
        weights = collect(model, [name for name, _ in model.named_parameters()])
        release(engine)
        return weights

    start_distributed()
    torch.manual_seed(0)
    before = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied))
    got = trained()
    monkeypatch.setattr(loss, "chunked_head", lambda model: None)
    expected = trained()
    for name, start in before.named_parameters():
        moved = expected[name] - start.detach()
        assert moved.norm() > 0 and (got[name] - expected[name]).norm() <= 1e-5 * moved.norm(), name


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(KNOWN_HEADS - {"stablelm"}))  # it attends by code of its own
def test_right_padded_rows_need_no_attention_mask(family: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(family), batch_of("nll")
    model.set_attn_implementation("eager" if family == "gemma2" else kernel)
    assert loss.works_without_mask(model)
    got = value_and_gradients(model, batch, "nll")
    monkeypatch.setattr(loss, "works_without_mask", lambda model: False)
    expected = value_and_gradients(model, batch, "nll")
    assert_same(got, expected)
