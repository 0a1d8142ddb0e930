"""The mask lands on its own unit: each element of each weight is checked by the name of the unit that owns it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.errors import RegionError
from cofitune.model.anatomy import anatomy_of
from cofitune.model.layouts import LAYOUTS, MODULES
from cofitune.model.region import resolve_region
from cofitune.softmask.factors import build_factors
from cofitune.vectors import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, UNIT_KINDS, unit_counts

PATHS = LAYOUTS["plain"].modules
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    mlp_bias=True,
)  # fmt: skip -- head_dim × heads (48) is not hidden_size (24): q and o are not square either


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG)


def _importance() -> dict[str, torch.Tensor]:
    counts = unit_counts(anatomy_of(LlamaForCausalLM(CONFIG)))
    generator = torch.Generator().manual_seed(0)
    return {kind: torch.rand(3, counts[kind], generator=generator) for kind in UNIT_KINDS}


def _owner(module: str, row: int, column: int) -> tuple[str, list[int]]:
    """By hand: which units own the element (row, column) of a module's weight."""
    if module in ("gate_proj", "up_proj"):
        return FFN_NEURONS, [row]
    if module == "down_proj":
        return FFN_OUTPUTS, [row]
    if module == "q_proj":
        return ATTENTION_HEADS, [row // 8]
    if module == "o_proj":
        return ATTENTION_HEADS, [column // 8]
    return ATTENTION_HEADS, [h for h in range(6) if h // 3 == row // 8]  # heads 0-2 share k/v head 0, 3-5 head 1


@pytest.mark.parametrize("module", MODULES)
def test_every_element_gets_the_factor_of_its_own_unit(model: LlamaForCausalLM, module: str) -> None:
    importance = _importance()
    region = resolve_region("1-2", [module], 3)
    factors = build_factors(importance, region, (module,), anatomy_of(model))
    parameters = dict(model.named_parameters())
    for layer in (1, 2):
        name = f"model.layers.{layer}.{PATHS[module]}.weight"
        weight = parameters[name]
        spread = factors[name].shaped(weight).expand_as(weight)
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                kind, units = _owner(module, row, column)
                expected = 1 - max(importance[kind][layer, u].item() for u in units)
                assert spread[row, column].item() == pytest.approx(expected, abs=1e-7)


def test_a_bias_is_masked_with_its_row_and_o_projs_bias_is_free(model: LlamaForCausalLM) -> None:
    region = resolve_region("0", ["all"], 3)
    factors = build_factors(_importance(), region, region.modules, anatomy_of(model))
    for module in MODULES:
        prefix = f"model.layers.0.{PATHS[module]}"
        if module == "o_proj":
            assert f"{prefix}.bias" not in factors
        else:
            assert torch.equal(factors[f"{prefix}.bias"].values, factors[f"{prefix}.weight"].values)


def test_only_the_asked_modules_of_the_regions_layers_are_masked(model: LlamaForCausalLM) -> None:
    region = resolve_region("1", ["up_proj", "down_proj"], 3)
    factors = build_factors(_importance(), region, ("up_proj",), anatomy_of(model))
    assert set(factors) == {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"}


def test_a_mask_on_what_is_not_trained_is_refused(model: LlamaForCausalLM) -> None:
    region = resolve_region("1", ["up_proj"], 3)
    with pytest.raises(RegionError, match=r"q_proj would be masked but not trained \(trained: up_proj\)"):
        build_factors(_importance(), region, ("q_proj",), anatomy_of(model))


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.001])
def test_strength_is_how_much_of_the_importance_counts(model: LlamaForCausalLM, strength: float) -> None:
    region = resolve_region("1", ["all"], 3)
    importance = _importance()
    whole = build_factors(importance, region, region.modules, anatomy_of(model))
    found = build_factors(importance, region, region.modules, anatomy_of(model), strength)
    assert found.keys() == whole.keys()
    for name, factor in found.items():
        by_hand = [1 - strength * (1 - value) for value in whole[name].values.tolist()]
        assert factor.axis == whole[name].axis
        torch.testing.assert_close(factor.values, torch.tensor(by_hand), rtol=1e-6, atol=1e-7)
