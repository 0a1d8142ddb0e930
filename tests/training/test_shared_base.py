"""Trials around one held model: bit for bit those of fresh models, and nothing of theirs stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.training.shared_base import SharedBase, checksum
from tests.helpers import run_ranks

ORDER = (0, 1, 2, 0)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_after_engine_on_held_weights_trains_as_on_a_fresh_model(ranks: int, tmp_path: Path) -> None:
    """ZeRO 1, 2 and 3 in fp32 and bf16: other regions in between, and the same one again."""
    run_ranks("training.shared_base_cases", tmp_path / "found.json", ranks=ranks)
    for way in json.loads((tmp_path / "found.json").read_text()):
        name = f"stage {way['stage']}, {'bf16' if way['bf16'] else 'fp32'}"
        assert way["after"] == [way["alone"][number] for number in ORDER], name
        assert way["alone"][0] != way["alone"][1], "each region trains something else"
        assert way["changed"] == [], name
        assert way["shared"] == [way["stage"] < 3] * len(ORDER), f"{name}: stage 3 alone takes what is frozen apart"
        grown = way["alive"][-1] - way["alive"][0]
        assert grown < 200, f"{name}: {grown} bytes of tensors more after two trials"  # the smallest: q and v, 20 kB


def tied_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def test_a_fresh_object_shares_the_weights_and_keeps_tied_ones_tied() -> None:
    model = tied_model()
    held = SharedBase(model)
    one, two = held.instantiate(), held.instantiate()
    assert one is not two and one.lm_head.weight is one.model.embed_tokens.weight
    for (name, mine), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert mine is not other and mine.data_ptr() == model.get_parameter(name).data_ptr() == other.data_ptr()
    one.get_parameter("model.norm.weight").requires_grad_(False)
    assert two.get_parameter("model.norm.weight").requires_grad


def test_what_trains_is_copied_and_nothing_else() -> None:
    model = tied_model()
    names = ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]  # two are one
    one = SharedBase(model).instantiate(trains=names)
    copied = {n for n, p in one.named_parameters() if p.data_ptr() != model.get_parameter(n).data_ptr()}
    assert copied == {names[0], names[2]} and one.lm_head.weight is one.model.embed_tokens.weight
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in one.named_parameters())


def test_weights_on_a_device_are_shared_there_by_all_later_models() -> None:
    """The meta device stands for a GPU: what lies on it can only have been put there by `place`."""
    model, device, name = tied_model(), torch.device("meta"), "model.layers.1.mlp.up_proj.weight"
    held = SharedBase(model)
    held.place(device)
    one, two = held.instantiate(trains=[name]), held.instantiate({name: torch.ones_like(model.get_parameter(name))})
    held.place(device)  # it is there: nothing is brought again
    three = held.instantiate()
    for (other, mine), theirs, later in zip(one.named_parameters(), two.parameters(), three.parameters(), strict=True):
        assert {mine.device, theirs.device, later.device} == {device}
        places = {p.untyped_storage()._cdata for p in (mine, theirs, later)}
        assert len(places) == (3 if other == name else 1), other
    held.place(torch.device("cpu"))
    back = held.instantiate()
    assert all(p.data_ptr() == model.get_parameter(n).data_ptr() for n, p in back.named_parameters())
    assert held.changed() == []


def test_tensors_may_take_the_place_of_held_ones_without_touching_them() -> None:
    model = tied_model()
    held = SharedBase(model)
    name = "model.layers.1.mlp.up_proj.weight"
    instead = torch.ones_like(model.get_parameter(name))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = held.instantiate()(ids).logits
        changed = held.instantiate({name: instead})
        expected = tied_model()
        expected.load_state_dict({**model.state_dict(), name: instead})
        assert torch.equal(changed(ids).logits, expected(ids).logits)
        assert torch.equal(held.instantiate()(ids).logits, before)
    assert held.changed() == []


def test_a_tensor_that_was_written_into_is_named() -> None:
    model = tied_model()
    held = SharedBase(model)
    with torch.no_grad():
        held.instantiate().get_parameter("model.norm.weight")[3] += 1e-6
    assert held.changed() == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("count", [1, 7, 8, 24])
def test_a_checksum_sees_every_element(dtype: torch.dtype, count: int) -> None:
    whole = torch.arange(1, count + 2).to(dtype)
    tensor = nn.Parameter(whole[1:], requires_grad=False)  # begins in the middle of a storage
    before = checksum(tensor)
    for index in range(count):
        kept = tensor.data[index].clone()
        tensor.data[index] = 100
        assert checksum(tensor) != before
        tensor.data[index] = kept
    assert checksum(tensor) == before
