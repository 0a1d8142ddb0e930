"""Which weights decay, against Hugging Face's Trainer; and what the optimizer of 8-bit moments is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from cofitune.errors import UserError
from cofitune.model.anatomy import read_anatomy
from cofitune.training import moments, optimizer
from cofitune.training.moments import BLOCK, MomentWriter, begin_moments, block_scales, read_moment
from cofitune.zero import Flat

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "cohere2", "gemma3_text", "olmo2", "phi", "bloom", "opt")


def _model(family: str) -> nn.Module:
    wide = {"ffn_dim": 24, "word_embed_proj_dim": 16} if family == "opt" else {"intermediate_size": 24}
    config = AutoConfig.for_model(family, **SMALL, **wide, pad_token_id=0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_do_not_decay_as_with_hugging_face(family: str) -> None:
    model = _model(family)
    decaying, *rest = optimizer.decay_groups(model, 0.1, decay_all=False)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = set(Trainer.get_decay_parameter_names(None, model))
    assert {names[id(p)] for p in decaying["params"]} == expected & {*names.values()}
    assert decaying["weight_decay"] == 0.1 and [group["weight_decay"] for group in rest] == [0.0]
    assert sum(len(group["params"]) for group in (decaying, *rest)) == len(names)


def test_only_what_trains_is_in_a_group_and_no_group_is_empty() -> None:
    model = _model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    (group,) = optimizer.decay_groups(model, 0.1, decay_all=False)
    assert len(group["params"]) == 2


def test_all_decay_where_that_is_asked_for() -> None:
    (group,) = optimizer.decay_groups(_model("gpt2"), 0.1, decay_all=True)
    assert group["weight_decay"] == 0.1


def test_names_and_shapes_tell_whether_anything_is_left_out() -> None:
    anatomy = read_anatomy(AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=40))
    assert optimizer.may_be_undecayed(["transformer.h.0.ln_1.weight"], anatomy.shapes)
    assert optimizer.may_be_undecayed(["transformer.h.0.attn.c_attn.bias"], anatomy.shapes)
    assert not optimizer.may_be_undecayed(["transformer.h.0.attn.c_attn.weight"], anatomy.shapes)


def test_8_bit_moments_without_their_package_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"train.optimizer: adamw_8bit needs bitsandbytes, which is not installed: pip"):
        optimizer.check_optimizer("adamw_8bit")
    optimizer.check_optimizer("adamw")


class _Flats:
    """One flat tensor and the optimizer that steps on it, as an engine has them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        torch.manual_seed(3)
        self.flat = Flat(nn.Parameter(torch.randn(count)), [])
        groups = [{"params": [self.flat.tensor], "weight_decay": 0.3}]
        self.basic_optimizer = optimizer.adamw_8bit(groups, 1e-2, (0.9, 0.95), 1e-8)
        monkeypatch.setattr("cofitune.training.moments.flats", lambda engine: [engine.flat])

    def step(self) -> torch.Tensor:
        gradient = torch.randn(len(self.flat.tensor))
        self.flat.tensor.grad = gradient.clone()
        self.basic_optimizer.step()
        return gradient


@pytest.mark.parametrize("at_once", [4 * BLOCK, 2**22])
def test_8_bit_moments_are_read_and_written_as_the_package_means_them(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(moments, "CODED_AT_ONCE", at_once)
    engine = _Flats(monkeypatch, 5000)  # the last block is cut
    for _ in range(3):
        engine.step()
    state = engine.basic_optimizer.state[engine.flat.tensor]
    for kind, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        scales = functional.QuantState(state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCK)
        scales.dtype = torch.float32
        expected = functional.dequantize_blockwise(state[f"state{number}"], scales)
        assert torch.equal(read_moment(engine, engine.flat, kind, slice(300, 4900)), expected[300:4900])
    other = _Flats(monkeypatch, 5000)
    begin_moments(other, 3)
    writer = MomentWriter(other)
    for kind in ("exp_avg", "exp_avg_sq"):
        writer.write(other.flat, kind, slice(0, 5000), read_moment(engine, engine.flat, kind, slice(0, 5000)))
    writer.finish({})  # with scales made anew
    for kind in ("exp_avg", "exp_avg_sq"):
        before, after = (read_moment(e, e.flat, kind, slice(0, 5000)) for e in (engine, other))
        assert (before - after).abs().max() <= 0.02 * before.abs().max()
    for kind in ("exp_avg", "exp_avg_sq"):
        writer.write(other.flat, kind, slice(0, 5000), read_moment(engine, engine.flat, kind, slice(0, 5000)))
    writer.finish(block_scales(engine))
    expected, codes = (e.basic_optimizer.state[e.flat.tensor] for e in (engine, other))
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(codes[name], expected[name]), f"{name} is not what was saved"


def test_8_bit_steps_stay_near_those_of_plain_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    engine = _Flats(monkeypatch, 5000)
    start = engine.flat.tensor.detach().clone()
    plain = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([plain], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    for _ in range(4):
        plain.grad = engine.step()
        reference.step()
    difference = (engine.flat.tensor - plain).norm() / (plain - start).norm()
    assert difference < 0.05
