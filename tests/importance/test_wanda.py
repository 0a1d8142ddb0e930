"""Wanda's scores of input columns, family by family, against the unfused copy's inputs, kept and added up by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cofitune.errors import UserError
from cofitune.importance.estimate import WANDA, EstimatorSettings, estimate
from cofitune.importance_file import COLUMNS, column_kind, layer_units, unit_counts
from cofitune.model.anatomy import anatomy_of
from tests.model import test_layouts as layouts

SETTINGS = EstimatorSettings(0.1, 0, WANDA, "squared")


def batch_of(ids: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


LENGTHS = [[9, 5, 7, 9], [4, 9, 9, 3], [9, 9, 2, 6]]
BATCHES = [batch_of(layouts.random_ids(n), lengths) for n, lengths in enumerate(LENGTHS)]


def by_hand(family: str, model: Any, batches: list[dict[str, Tensor]]) -> dict[tuple[int, str], Tensor]:
    """‖x_j‖/√N · Σ_i |W_ij| of each linear module, item by item and without padding."""
    twin, modules = layouts.unfused(family, model)
    seen: dict[tuple[int, str], list[Tensor]] = {key: [] for key in modules}
    for key, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, key=key: seen[key].append(inputs[0].detach()))
    twin.eval()
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                twin(ids[mask.bool()][None])
    scores = {}
    for key, module in modules.items():
        inputs = torch.cat([x.flatten(0, -2) for x in seen[key]]).double()  # [N, columns]
        columns = range(inputs.shape[1])
        norms = [float(sum(inputs[:, j] ** 2)) ** 0.5 / len(inputs) ** 0.5 for j in columns]
        scores[key] = torch.tensor(
            [norms[j] * float(module.weight.detach()[:, j].double().abs().sum()) for j in columns]
        )
    return scores


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_column_scores_are_those_of_the_unfused_copy(family: str) -> None:
    model = layouts.build(family)
    anatomy = anatomy_of(model)
    found = estimate(model, enumerate(BATCHES), SETTINGS)
    expected = by_hand(family, layouts.build(family), BATCHES)
    assert (
        set(found.values) == {column_kind(module) for module in anatomy.modules} == set(unit_counts(anatomy, COLUMNS))
    )
    for (layer, module), scores in expected.items():
        kind = column_kind(module)
        assert layer_units(anatomy, kind)[layer] == len(scores)
        torch.testing.assert_close(found.values[kind][layer, : len(scores)].float(), scores, rtol=2e-4, atol=1e-6)
        assert not found.values[kind][layer, len(scores) :].any()
    absent = [(layer, m) for layer in range(layouts.L) for m in anatomy.modules if (layer, m) not in expected]
    assert all(not found.values[column_kind(module)][layer].any() for layer, module in absent)


def test_halves_are_of_even_and_odd_micro_batches_whatever_their_order() -> None:
    model = layouts.build("llama")
    numbered = list(enumerate(BATCHES))
    found, turned = (estimate(model, batches, SETTINGS) for batches in (numbered, numbered[::-1]))
    tokens = sum(map(sum, LENGTHS))
    assert (found.tokens, found.samples, found.micro_batches) == (tokens, 12, 3)
    even = by_hand("llama", model, BATCHES[::2])
    share = (sum(LENGTHS[0]) + sum(LENGTHS[2])) / tokens  # both halves are divided by all tokens
    for (layer, module), scores in even.items():
        kind = column_kind(module)
        torch.testing.assert_close(found.halves[kind][0, layer].float(), scores * share**0.5, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(found.halves[kind], turned.halves[kind], rtol=1e-12, atol=0)
        squares = found.halves[kind].square().sum(dim=0)
        torch.testing.assert_close(found.values[kind], squares.sqrt(), rtol=1e-9, atol=0)


def test_the_model_is_left_as_it_was_and_no_gradient_is_made() -> None:
    model = layouts.build("gpt2").train()
    model.transformer.h[0].mlp.eval()
    before = [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    estimate(model, enumerate(BATCHES), SETTINGS)
    assert [(m.training, len(m._forward_pre_hooks)) for m in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bfloat16_comes_close_to_float32() -> None:
    model = layouts.build("llama")
    exact = estimate(model, enumerate(BATCHES), SETTINGS).values
    rough = estimate(model.to(torch.bfloat16), enumerate(BATCHES), SETTINGS).values
    for kind, values in exact.items():
        torch.testing.assert_close(rough[kind], values, rtol=0.05, atol=1e-3)


def test_a_module_that_sees_other_tokens_is_named() -> None:
    model = layouts.build("llama")
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.nn.functional.pad(whole(x[:, 1:]), (0, 0, 1, 0))  # as where tokens are routed
    with pytest.raises(UserError, match="of layer 1 sees 32 tokens of 36") as raised:
        estimate(model, enumerate(BATCHES), SETTINGS)
    assert "use fisher" in str(raised.value)
