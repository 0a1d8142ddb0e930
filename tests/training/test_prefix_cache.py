"""The prefix cache: the same loss and gradient, without the frozen layers; on one rank here, on two in test_sharded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DbrxConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
)

from cofitune.data.batches import Batch, RehearsalMix, collate, plan_steps, rank_micro_batches
from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import join
from cofitune.errors import UserError
from cofitune.model.region import freeze_outside
from cofitune.training.engine import EngineSettings, checkpoint_layers, release, start_distributed, start_engine
from cofitune.training.loop import FitSettings, RehearsalLoss, fit
from cofitune.training.loss import summed_loss
from cofitune.training.prefix_cache import PrefixCache, PrefixPlan, changing_prefix
from cofitune.training.step_counts import StepCounts
from cofitune.training.throughput import Cost, Meter

pytestmark = pytest.mark.processes

FIRST, HIDDEN, LAYERS_ALL, STEPS = 2, 16, 4, 9
SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.float32, micro_batch=2,
    accumulation=2, learning_rate=5e-2, weight_decay=0.1, adam_betas=(0.9, 0.95), adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler_type="cosine", warmup_ratio=0.1, num_steps=STEPS,
)  # fmt: skip
SLIDING = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 4}, "qwen2": SLIDING, "qwen3": SLIDING, "gemma": {},
    "gemma2": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4}, "granite": {"embedding_multiplier": 12.0},
    "olmo2": {}, "smollm3": {}, "cohere2": {"sliding_window": 4}, "phi3": {}, "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
LAYERS = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}  # of the others: model.layers


def _model(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": LAYERS_ALL,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **KINDS[kind]))
    layers = LAYERS.get(kind, "model.layers")
    freeze_outside(model, {n for n, _ in model.named_parameters() if n.startswith(f"{layers}.{FIRST}.mlp")})
    return model


def _examples(count: int, longest: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(count):
        length = int(torch.randint(5, longest, (1,), generator=generator))
        ids = torch.randint(1, 32, (length,), generator=generator).tolist()
        examples.append(Example(ids, [IGNORED] * 3 + ids[3:]))
    return examples


def _plan(examples: list[Example], folder: Path, layers: str = "model.layers") -> PrefixPlan:
    return PrefixPlan(layers, FIRST, [len(e.input_ids) for e in examples], HIDDEN, torch.float32, folder)


def _gradients(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = summed_loss(model, batch)
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """In one shape of batch; embeddings that are scaled, sliding windows and tied heads included."""
    start_distributed()
    model, examples = _model(kind), _examples(4)
    (batch,) = rank_micro_batches(examples, range(4), plan_steps(4, 4, 1, 1, 1, None), 0, 0)
    layers = LAYERS.get(kind, "model.layers")
    cache = PrefixCache(model, _plan(examples, tmp_path, layers))
    called: list[str] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: called.append("embed_tokens"))
    for name, module in model.named_modules():
        if name.startswith(f"{layers}."):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with cache.writing(batch):
        loss, gradients = _gradients(model, batch)
    assert cache.count_missing(batch) == [0]
    assert any(name.startswith(f"{layers}.0") for name in called)
    called.clear()
    with cache.reading(batch):
        again, gradients_again = _gradients(model, batch)
    lowest = min(int(name.split(".")[2]) for name in called if name.startswith(layers))
    assert lowest == FIRST and not any("embed_tokens" in name for name in called)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, gradients_again))
    assert any(gradient.any() for gradient in gradients)
    after, _ = _gradients(model, batch)
    assert torch.equal(loss, after) and any("embed_tokens" in name for name in called), "the model is whole again"


@pytest.mark.parametrize("flat", [False, True])
def test_packs_are_kept_too_a_row_each_or_all_in_one(flat: bool, tmp_path: Path) -> None:
    start_distributed()
    items = _examples(5)
    examples = [join(items[:2]), join(items[2:4]), join(items[4:])]
    model, plan = _model(), plan_steps(3, 3, 1, 1, 1, None, flat)
    (batch,) = rank_micro_batches(examples, range(3), plan, 0, 0)
    assert len(batch["input_ids"]) == (1 if flat else 3) and len(batch["indices"]) == 3
    cache = PrefixCache(model, _plan(examples, tmp_path))
    with cache.writing(batch):
        loss = summed_loss(model, batch)
    with cache.reading(batch):
        assert torch.equal(summed_loss(model, batch), loss)
    other = rank_micro_batches(examples, range(3), plan_steps(3, 3, 1, 1, 1, None, not flat), 0, 0)
    with cache.reading(other[0]):
        torch.testing.assert_close(summed_loss(model, other[0]), loss)


def test_what_is_kept_stays_where_it_comes_beside_what_is_not(tmp_path: Path) -> None:
    start_distributed()
    model, examples = _model(), _examples(3)
    cache = PrefixCache(model, _plan(examples, tmp_path))
    first, second = ({**collate([examples[i] for i in of], 0), "indices": torch.tensor(of)} for of in ((0, 1), (1, 2)))
    with cache.writing(first):
        summed_loss(model, first)
    assert cache.count_missing(second) == [1]
    cache._rows.fill_(7.0)
    with cache.around(second, [1]):
        summed_loss(model, second)
    assert cache.count_missing(second) == [0]
    starts = cache._starts
    assert (cache._rows[: starts[2]] == 7.0).all(), "what was there is not written again"
    assert not (cache._rows[starts[2] :] == 7.0).any()


def _losses(
    tmp_path: Path, cached: bool, stage: int, micro_batch: int, longest: int, rehearsal: RehearsalMix | None = None
) -> tuple[list[float], int]:
    """Losses of four and a half epochs of 7 items, and how often the lowest frozen layer ran."""
    start_distributed()
    model, examples = _model(), _examples(7 + (rehearsal.size if rehearsal else 0), longest)
    checkpoint_layers(model, "model.layers", FIRST)
    ran: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    settings = replace(SETTINGS, zero_stage=stage, micro_batch=micro_batch)
    plan = plan_steps(7, micro_batch, settings.accumulation, 1, 1, STEPS, rehearsal=rehearsal)
    settings = replace(settings, rehearsal_micro_batches=plan.rehearsal_micro_batches)
    engine = start_engine(model, settings)
    cache = PrefixCache(engine.module, _plan(examples, tmp_path)) if cached else None
    losses: list[float] = []
    fitting = FitSettings(plan, 3, 0, rehearsal=RehearsalLoss("nll", 1.0) if rehearsal else None)
    fit(engine, examples, fitting, lambda record, _: losses.append(record.loss), prefix=cache)
    release(engine)
    return losses, len(ran)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_curve_over_epochs_is_the_same_to_fp32_rounding(stage: int, tmp_path: Path) -> None:
    whole, ran_whole = _losses(tmp_path, False, stage, 2, 12)
    cached, ran_cached = _losses(tmp_path, True, stage, 2, 12)
    assert cached == pytest.approx(whole, rel=1e-6)
    assert whole[-1] < whole[0] - 0.05, "training moved: the comparison would prove nothing otherwise"
    assert (ran_whole, ran_cached) == (STEPS * 2, 2 * 2), "two steps an epoch, two micro-batches a step"


@pytest.mark.parametrize(("size", "unseen"), [(30, STEPS), (1, 1)])
def test_rehearsal_that_is_new_does_not_stop_the_reuse_of_the_items(size: int, unseen: int, tmp_path: Path) -> None:
    """An answer a step beside four items: of a large pool always another one, of a pool of one always the same."""
    rehearsal = RehearsalMix(first=7, size=size, share=0.2)
    whole, ran_whole = _losses(tmp_path, False, 3, 2, 12, rehearsal)
    cached, ran_cached = _losses(tmp_path, True, 3, 2, 12, rehearsal)
    assert cached == pytest.approx(whole, rel=1e-6)
    assert (ran_whole, ran_cached) == (STEPS * 3, 2 * 2 + unseen), "the items' micro-batches run in the first epoch"


def test_a_step_needs_what_its_micro_batches_do_that_were_not_kept() -> None:
    whole, cached = Cost(100, 10, 5), Cost(60, 6, 5)
    counts = StepCounts(7, 2, 50, tokens=(20, 12, 8), pairs=(40, 30, 20), missing=((0,), (3,), ()))
    figures = counts.figures(2.0, Meter(whole, cached, 1e4, "some device"))
    flops = (20 * 60 + 40 * 6) + (12 * 100 + 30 * 10) + (8 * 100 + 20 * 10) + 9 * 5
    assert figures["mfu"] == pytest.approx(flops / 2e4)
    assert figures["tokens"] == 40 and figures["padded_share"] == pytest.approx(0.2)


def test_the_loss_curve_is_the_same_bit_for_bit_where_the_shapes_are(tmp_path: Path) -> None:
    whole, _ = _losses(tmp_path, False, 3, 1, 6)
    cached, _ = _losses(tmp_path, True, 3, 1, 6)
    assert cached == whole


def test_the_file_has_no_name_left_and_the_size_that_was_told(tmp_path: Path) -> None:
    start_distributed()
    plan = _plan(_examples(5), tmp_path)
    assert plan.num_bytes == sum(plan.lengths) * HIDDEN * 4 + 5
    cache = PrefixCache(_model(), plan)
    assert list(tmp_path.iterdir()) == []
    (batch,) = rank_micro_batches(_examples(5), range(5), plan_steps(5, 5, 1, 1, 1, None), 0, 0)
    assert cache.count_missing(batch) == [5]


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_distributed()
    plan = replace(_plan(_examples(5), tmp_path), lengths=[10**15])
    with pytest.raises(UserError, match=r"train.prefix_cache needs .* GiB are free; set it to none"):
        plan.check_space()

    def full(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)  # between the check and the start, others took the room
    with pytest.raises(UserError, match="no room for .* No space left"):
        PrefixCache(_model(), _plan(_examples(5), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_ranks_on_two_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_distributed()

    def two_hosts(results: list[str], _: str) -> None:
        results[:] = ["a", "b"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", two_hosts)
    with pytest.raises(UserError, match="2 machines, which share no memory"):
        PrefixCache(_model(), _plan(_examples(5), tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(attention_dropout=0.1), "attention_dropout: 0.1"),
        (GPT2Config(resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.0), "resid_pdrop: 0.2"),
        (DbrxConfig(attn_config={"attn_pdrop": 0.1}), "attn_pdrop: 0.1"),
        (MixtralConfig(router_jitter_noise=0.01), "router_jitter_noise: 0.01"),
        (Gemma4TextConfig(num_kv_shared_layers=2, hidden_size_per_layer_input=0), "num_kv_shared_layers"),
        (Gemma4Config(text_config={"num_kv_shared_layers": 2}), "num_kv_shared_layers"),
        (Gemma4TextConfig(num_kv_shared_layers=0, hidden_size_per_layer_input=16), "hidden_size_per_layer_input"),
        (Gemma4TextConfig(num_kv_shared_layers=0, hidden_size_per_layer_input=0), None),
        (LlamaConfig(attention_dropout=0.0, classifier_dropout=0.1), None),
    ],
)
def test_a_prefix_that_changes_is_named(config: PretrainedConfig, reason: str | None) -> None:
    result = changing_prefix(config)
    assert result is None if reason is None else reason in str(result)
