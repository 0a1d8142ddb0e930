"""The mask along input columns: factors family by family against a matrix written by hand, and both axes at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cofitune.errors import RegionError
from cofitune.importance_file import COLUMNS, column_kind
from cofitune.model.anatomy import anatomy_of
from cofitune.model.region import match_region, resolve_region
from cofitune.softmask.columns import build_column_factors
from cofitune.softmask.factors import Factor, freeze_factors, join, shuffle_units
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.update import hold_back
from cofitune.zero import Shard
from tests.model import test_layouts as layouts
from tests.training.sharded_cases import tiny_mixture


@pytest.mark.parametrize("family", layouts.FAMILIES)
@pytest.mark.parametrize("modules", [("all",), *layouts.PARTS])
def test_every_element_has_its_own_columns_factor(family: str, modules: tuple[str, ...]) -> None:
    model = layouts.build(family)
    anatomy = anatomy_of(model)
    region = resolve_region("1", modules, layouts.L, anatomy.modules)
    importance = layouts.random_importance(anatomy, COLUMNS)
    mask = build_column_factors(importance, region, region.modules, anatomy, strength=0.7)
    factors = join(freeze_factors(region, anatomy), mask)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = torch.ones_like(parameter)
            parameter.copy_(factors[name].scaled(whole) if name in factors else whole)
    trained = set(region.parameter_names(anatomy))
    assert factors.keys() <= trained and any(len(anatomy.shapes[n]) == 2 for n in factors)
    for (layer, module, kind), found in layouts.trained_parts(family, model).items():
        if layer != 1 or not set(anatomy.layout.parts(module)) & set(region.modules):
            assert (found == 1).all()
        elif module not in region.modules:
            assert (found == 0).all(), "it is held: its tensor trains in part"
        else:
            own = layouts.column_factor_of(importance, anatomy, layer, module, found, region.modules)
            expected = 1 - 0.7 * (1 - own)
            torch.testing.assert_close(found, expected if kind == "weight" else torch.ones_like(found))


def test_a_region_of_biases_alone_has_no_columns() -> None:
    anatomy = anatomy_of(layouts.build("gpt2"))
    region = match_region(r".*mlp\.c_fc\.bias", anatomy)
    importance = layouts.random_importance(anatomy, COLUMNS)
    assert region.modules, "so it trains, and would have trained unmasked"
    with pytest.raises(RegionError, match="finds no trained weight of up_proj"):
        build_column_factors(importance, region, region.modules, anatomy)


def test_the_uniform_control_is_each_weights_mean() -> None:
    anatomy = anatomy_of(layouts.build("phi3"))
    region = resolve_region("1", ("all",), layouts.L, anatomy.modules)
    importance = layouts.random_importance(anatomy, COLUMNS)
    own = build_column_factors(importance, region, region.modules, anatomy)
    uniform = build_column_factors(importance, region, region.modules, anatomy, uniform=True)
    for name, factor in own.items():
        torch.testing.assert_close(uniform[name].values, factor.values.mean().expand_as(factor.values))


def test_shuffled_columns_keep_each_factor_of_a_fused_tensor() -> None:
    anatomy = anatomy_of(layouts.build("phi3"))
    region = resolve_region("1", ("all",), layouts.L, anatomy.modules)
    importance = layouts.random_importance(anatomy, COLUMNS)
    own, moved = (
        build_column_factors(one, region, region.modules, anatomy)
        for one in (importance, shuffle_units(importance, anatomy, 3))
    )
    for name, factor in own.items():
        assert torch.equal(factor.values.sort().values, moved[name].values.sort().values)
        assert not torch.equal(factor.values, moved[name].values)


def test_a_fused_tensor_of_which_a_part_trains_unmasked_is_refused() -> None:
    anatomy = anatomy_of(layouts.build("phi3"))
    region = resolve_region("1", ("mha",), layouts.L, anatomy.modules)
    importance = layouts.random_importance(anatomy, COLUMNS)
    with pytest.raises(RegionError, match="cannot mask q_proj without k_proj, v_proj, which trains in the same tensor"):
        build_column_factors(importance, region, ("q_proj", "o_proj"), anatomy)
    assert build_column_factors(importance, region, ("o_proj",), anatomy).keys() == {
        "model.layers.1.self_attn.o_proj.weight"
    }


def test_experts_have_no_columns_to_mask() -> None:
    anatomy = anatomy_of(tiny_mixture())
    region = resolve_region("1", ("mha", "experts"), 4, anatomy.modules)
    importance = layouts.random_importance(anatomy, COLUMNS)
    assert not any("experts" in kind for kind in importance)
    with pytest.raises(RegionError, match="which a tensor of all experts does not have"):
        build_column_factors(importance, region, region.modules, anatomy)
    heads = tuple(module for module in region.modules if module != "experts")
    assert len(build_column_factors(importance, region, heads, anatomy)) == 4


@pytest.mark.parametrize("axis", [0, 1])
def test_every_cut_of_a_weight_with_both_factors_equals_the_whole(axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, rows, columns = (torch.rand(s, generator=generator) for s in ((5, 7), (5, 7), (5,), (7,)))
    factor = Factor(*(rows, axis, columns) if axis == 0 else (columns, axis, rows))
    matrix = rows[:, None] * columns[None, :]
    expected = old + matrix * (new - old)
    for start in range(35):
        for end in range(start + 1, 36):
            piece = new.flatten()[start:end].clone()
            hold_back(piece, old.flatten()[start:end].clone(), Shard("w", (5, 7), start, 0, end - start), factor)
            torch.testing.assert_close(piece, expected.flatten()[start:end])
    torch.testing.assert_close(factor.scaled(new), matrix * new)


def test_gradient_mode_scales_the_gradient_of_each_column() -> None:
    layer = torch.nn.Linear(3, 2)
    values = torch.tensor([0.0, 0.5, 1.0])
    handles = mask_gradients(layer, {"weight": Factor(values, 1)})
    inputs = torch.rand(4, 3)
    layer(inputs).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, inputs.sum(dim=0).expand(2, 3) * values)
    for handle in handles:
        handle.remove()


def test_layers_without_a_module_and_narrower_ones_are_left_alone() -> None:
    anatomy = anatomy_of(layouts.build("lfm2"))
    importance = layouts.random_importance(anatomy, COLUMNS)
    layers = [n for n in range(layouts.L) if not anatomy.has(n, "q_proj")]
    assert layers, "every layer has attention: the case would prove nothing"
    kind: Tensor = importance[column_kind("q_proj")]
    kind[layers] = math.nan
    region = resolve_region("all", ("mha",), layouts.L, anatomy.modules)
    factors = build_column_factors(importance, region, region.modules, anatomy)
    assert factors and all(torch.isfinite(factor.values).all() for factor in factors.values())
