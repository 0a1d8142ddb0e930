"""The rotary embedding in fewer operations, against transformers' own under autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cofitune.training.engine import checkpoint_layers
from cofitune.training.rotary import Rotation, fuse_rotary
from tests.training.test_swiglu import gradients_of, small_model

FAMILIES = ["gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3", "stablelm"]
Rotate = Callable[..., tuple[Tensor, Tensor]]


def _layouts() -> dict[str, Tensor]:
    """Queries [B, A, T, D] = [2, 4, 6, 8] as they lie in memory: as projections give them, of a part, and repeated."""
    return {
        "plain": torch.randn(2, 4, 6, 8),
        "transposed": torch.randn(2, 6, 4, 8).transpose(1, 2),
        "part of a head": torch.randn(2, 6, 4, 20).transpose(1, 2)[..., 3:11],
        "one for all heads": torch.randn(2, 1, 6, 8).expand(2, 4, 6, 8),
    }


def _both(rotate: Rotate, q: Tensor, angles: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Both results, and the gradients of queries and keys."""
    torch.manual_seed(1)
    q = q.to(dtype).detach().requires_grad_()
    k = torch.randn(2, 2, 6, 8).to(dtype).requires_grad_()
    results = rotate(q, k, angles.cos().to(dtype), angles.sin().to(dtype))
    torch.autograd.backward(results, [torch.randn(r.shape).to(r.dtype) for r in results])
    return [*(r.detach() for r in results), q.grad, k.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", _layouts())
def test_results_and_gradients_have_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    angles = torch.randn(2, 6, 8)  # other angles in the second half, too
    q = _layouts()[layout]
    plain, own = _both(apply_rotary_pos_emb, q, angles, dtype), _both(Rotation(), q, angles, dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, own, strict=True))


def test_angles_of_another_precision_than_the_queries_are_taken() -> None:
    def in_bfloat16(rotate: Rotate) -> Rotate:
        return lambda q, k, cos, sin: rotate(q.bfloat16(), k.bfloat16(), cos, sin)

    q, angles = _layouts()["transposed"], torch.randn(1, 6, 8)
    plain, own = (_both(in_bfloat16(r), q, angles, torch.float32) for r in (apply_rotary_pos_emb, Rotation()))
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], own[:2], strict=True))
    for theirs, ours in zip(plain[2:], own[2:], strict=True):  # rounded once, where autograd rounds both parts first
        assert torch.allclose(theirs, ours, rtol=2**-7, atol=2**-7)


def test_angles_that_are_learned_get_their_gradients() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    found: list[Tensor] = []
    for rotate in (apply_rotary_pos_emb, Rotation()):
        angles = torch.ones(1, 6, 8).requires_grad_()
        turned, keys = rotate(q, k, angles.cos(), angles.sin())
        found += torch.autograd.grad(turned.sum() + keys.sum(), angles)
    assert torch.equal(found[0], found[1])


def test_the_tables_of_one_pass_are_made_once_and_others_do_not_mix() -> None:
    rotation, q, k = Rotation(), torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    tables = [(torch.randn(1, 6, 8), torch.randn(1, 6, 8)) for _ in range(6)]
    for cos, sin in [*tables, *reversed(tables)]:
        plain, own = apply_rotary_pos_emb(q, k, cos, sin), rotation(q, k, cos, sin)
        assert all(torch.equal(a, b) for a, b in zip(plain, own, strict=True))
    cos, sin = tables[0]
    nodes: list[Any] = [rotation(q.requires_grad_(), k, cos, sin)[0].grad_fn for _ in range(2)]
    first, second = ([t.data_ptr() for t in node.saved_tensors] for node in nodes)
    assert first == second


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_loss_and_gradients_have_the_same_bits(family: str) -> None:
    plain, ours = small_model(family, ("all",)), small_model(family, ("all",))
    assert fuse_rotary(ours) == 4
    (loss, gradients, kept), (own_loss, own_gradients, own_kept) = gradients_of(plain), gradients_of(ours)
    assert torch.equal(loss, own_loss) and gradients.keys() == own_gradients.keys()
    assert all(torch.equal(gradients[name], own_gradients[name]) for name in gradients)
    assert own_kept <= kept


def test_layers_that_are_computed_again_have_the_same_gradients() -> None:
    plain, ours = small_model("llama", ("q_proj",)), small_model("llama", ("q_proj",))
    fuse_rotary(ours)
    checkpoint_layers(ours, "model.layers", 1)
    ours.train()
    (loss, gradients, _), (own_loss, own_gradients, _) = gradients_of(plain), gradients_of(ours)
    assert torch.equal(loss, own_loss)
    assert all(torch.equal(gradients[name], own_gradients[name]) for name in gradients)


@pytest.mark.parametrize("family", ["gpt2", "cohere", "gpt_neox", "olmo2", "glm4"])
def test_other_embeddings_stay_as_they_are(family: str) -> None:
    small = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    grouped = {} if family == "gpt2" else {"intermediate_size": 48, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **grouped, pad_token_id=0))
    assert fuse_rotary(model) == 0


def test_other_models_of_the_process_and_copies_keep_apart() -> None:
    other, ours = small_model("llama", ("all",)), small_model("llama", ("all",))
    fuse_rotary(ours)
    copied: Any = copy.deepcopy(ours)
    attention = [m.model.layers[0].self_attn for m in (other, ours, copied)]
    assert "forward" not in vars(attention[0])
    assert attention[2].forward.__self__ is attention[2] and attention[1].forward.__self__ is attention[1]
