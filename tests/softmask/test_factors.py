"""The mask lands on its own unit: each element of each weight is checked by the name of the unit that owns it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.errors import RegionError
from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, UNIT_KINDS, unit_counts
from cofitune.model.anatomy import anatomy_of
from cofitune.model.layouts import LAYOUTS, MODULES
from cofitune.model.region import resolve_region
from cofitune.softmask.factors import UNIT_OF_MODULE, build_factors, harden, shuffle_units

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


@pytest.mark.parametrize("module", MODULES)
def test_a_hard_mask_holds_the_important_units_and_no_other(model: LlamaForCausalLM, module: str) -> None:
    importance, threshold = _importance(), 0.6
    region = resolve_region("1", [module], 3)
    factors = build_factors(harden(importance, threshold), region, (module,), anatomy_of(model), 0.75)
    weight = model.get_parameter(f"model.layers.1.{PATHS[module]}.weight")
    spread = factors[f"model.layers.1.{PATHS[module]}.weight"].shaped(weight).expand_as(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            kind, units = _owner(module, row, column)
            held = any(importance[kind][1, unit].item() >= threshold for unit in units)
            assert spread[row, column].item() == (0.25 if held else 1.0)


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
    result = build_factors(importance, region, region.modules, anatomy_of(model), strength)
    assert result.keys() == whole.keys()
    for name, factor in result.items():
        by_hand = [1 - strength * (1 - value) for value in whole[name].values.tolist()]
        assert factor.axis == whole[name].axis
        torch.testing.assert_close(factor.values, torch.tensor(by_hand), rtol=1e-6, atol=1e-7)


def test_the_uniform_control_is_each_modules_mean_factor(model: LlamaForCausalLM) -> None:
    anatomy, region = anatomy_of(model), resolve_region("1-2", MODULES, 3)
    mask = build_factors(_importance(), region, MODULES, anatomy, 0.7)
    control = build_factors(_importance(), region, MODULES, anatomy, 0.7, uniform=True)
    assert mask.keys() == control.keys()
    for name, factor in control.items():
        assert factor.values.unique().numel() == 1 and factor.axis == mask[name].axis
        assert factor.values.mean().item() == pytest.approx(mask[name].values.mean().item(), rel=1e-6)


def test_the_shuffled_control_has_the_same_factors_on_other_units(model: LlamaForCausalLM) -> None:
    anatomy, region, importance = anatomy_of(model), resolve_region("all", MODULES, 3), _importance()
    shuffled = shuffle_units(importance, anatomy, 5)
    assert all(torch.equal(shuffled[k], v) for k, v in shuffle_units(importance, anatomy, 5).items())
    assert not all(torch.equal(shuffled[k], v) for k, v in shuffle_units(importance, anatomy, 6).items())
    for kind, values in importance.items():
        assert torch.equal(shuffled[kind].sort(dim=1).values, values.sort(dim=1).values)
        assert not torch.equal(shuffled[kind], values)
    mask, control = (build_factors(i, region, MODULES, anatomy) for i in (importance, shuffled))
    for name, factor in mask.items():
        # keys and values, too, though they are masked by the maxima over their groups of heads
        assert torch.equal(factor.values.sort().values, control[name].values.sort().values), name
    moved = [n for n in mask if not torch.equal(mask[n].values, control[n].values)]
    assert len(moved) > 0.8 * len(mask)
    assert set(UNIT_OF_MODULE.values()) - {"experts"} == importance.keys()
