"""RMSNorm in fewer operations, against transformers' own under autograd and against float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cofitune.model.norms import has_known_norms
from cofitune.training.engine import checkpoint_layers
from cofitune.training.rms_norm import fuse_norms
from tests.training.test_swiglu import gradients_of, small_model

NORMS = {"llama": "LlamaRMSNorm", "olmo2": "Olmo2RMSNorm", "gemma3": "Gemma3RMSNorm"}  # one of each form
FAMILIES = {  # and how many norms four layers have, with the last one
    "gemma": 9, "gemma2": 17, "gemma3_text": 25, "granite": 9, "llama": 9, "mistral": 9, "olmo2": 17, "olmo3": 17,
    "phi3": 9, "qwen2": 9, "qwen3": 17, "smollm3": 9,
}  # fmt: skip
WIDTH = 48


def _norm(family: str, dtype: torch.dtype, fused: bool = False) -> Any:
    torch.manual_seed(0)
    module: Any = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), NORMS[family])
    norm = module(WIDTH)
    nn.init.normal_(norm.weight)
    assert fuse_norms(norm) == 1 if fused else True
    return norm.to(dtype)


def _passes(norm: Any, hidden: Tensor, gradient: Tensor) -> list[Tensor]:
    """The result, and the gradients of the input and of the weight, in float64."""
    hidden = hidden.clone().requires_grad_()
    result = norm(hidden)
    assert result.dtype == hidden.dtype
    return [t.detach().double() for t in (result, *torch.autograd.grad(result, (hidden, norm.weight), gradient))]


def _exact(norm: Any, hidden: Tensor, gradient: Tensor) -> list[Tensor]:
    """The formula in float64, under autograd."""
    x, weight = hidden.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    factor = 1 + weight if "Gemma" in type(norm).__name__ else weight
    result = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * factor
    return [result.detach(), *torch.autograd.grad(result, (x, weight), gradient.double())]


@pytest.mark.parametrize("family", NORMS)
def test_a_norm_gives_the_same_bits_and_the_gradients_of_the_formula(family: str) -> None:
    hidden, gradient = torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH)
    plain, own = (_passes(_norm(family, torch.float32, fused), hidden, gradient) for fused in (False, True))
    assert torch.equal(own[0], plain[0])
    for found, exact in zip(own, _exact(_norm(family, torch.float32), hidden, gradient), strict=True):
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("family", NORMS)
def test_in_bfloat16_no_gradient_is_less_exact_than_autograds(family: str) -> None:
    hidden, gradient = torch.randn(64, 16, WIDTH).bfloat16(), torch.randn(64, 16, WIDTH).bfloat16()
    plain, own = (_passes(_norm(family, torch.bfloat16, fused), hidden, gradient) for fused in (False, True))
    exact = _exact(_norm(family, torch.bfloat16), hidden, gradient)
    assert torch.equal(own[0], plain[0])
    for found, theirs, true in zip(own[1:], plain[1:], exact[1:], strict=True):
        assert float((found - true).norm()) <= 1.001 * float((theirs - true).norm())


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_torchs_kernel_computes_the_forms_that_it_is_taken_for(family: str) -> None:
    """On a GPU; here what torch puts in its place on a CPU is compared."""
    hidden, norm = torch.randn(3, 5, WIDTH), _norm(family, torch.float32)
    found = nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    assert torch.allclose(found, norm(hidden), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_models_loss_has_the_same_bits_and_its_gradients_agree(family: str) -> None:
    plain, ours = small_model(family, ("all",)), small_model(family, ("all",))
    assert has_known_norms(plain) and fuse_norms(ours) == FAMILIES[family]
    (loss, gradients, kept), (own_loss, own_gradients, own_kept) = gradients_of(plain), gradients_of(ours)
    assert torch.equal(loss, own_loss) and gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        assert float((own_gradients[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name
    assert own_kept <= kept


def test_in_bfloat16_a_norm_keeps_its_input_and_no_fp32_copy() -> None:
    plain, ours = (small_model("llama", ("up_proj", "down_proj"), torch.bfloat16) for _ in range(2))
    fuse_norms(ours)
    kept, own_kept = gradients_of(plain)[2], gradients_of(ours)[2]
    norms = 2 * 2 + 1  # of two layers above the lowest trained one, and the last
    assert kept - own_kept == norms * 36 * 32 * (4 - 2)


def test_layers_that_are_computed_again_have_the_same_gradients() -> None:
    ours, again = small_model("llama", ("up_proj", "down_proj")), small_model("llama", ("up_proj", "down_proj"))
    for model in (ours, again):
        fuse_norms(model)
        model.train()
    checkpoint_layers(again, "model.layers", 1)
    (loss, gradients, kept), (own_loss, own_gradients, own_kept) = gradients_of(ours), gradients_of(again)
    assert torch.equal(loss, own_loss) and own_kept < kept
    assert all(torch.equal(gradients[name], own_gradients[name]) for name in gradients)


@pytest.mark.parametrize("family", ["gpt2", "cohere", "stablelm", "gpt_neox"])
def test_other_norms_stay_as_they_are(family: str) -> None:
    small = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    wide = {} if family == "gpt2" else {"intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **wide, pad_token_id=0))
    assert fuse_norms(model) == 0 and not has_known_norms(model)


def test_a_norm_that_is_not_as_transformers_wrote_it_stays_as_it_is() -> None:
    replaced, derived = _norm("llama", torch.float32), _norm("llama", torch.float32)
    replaced.forward = lambda hidden: hidden  # as fused kernels do
    derived.__class__ = type("Own", (type(derived),), {"forward": lambda self, hidden: hidden})
    hidden = torch.randn(2, WIDTH)
    assert fuse_norms(replaced) == fuse_norms(derived) == 0
    assert replaced(hidden) is derived(hidden) is hidden
