"""Gradient statistics against a loop that keeps every gradient, plain and fused; the proxy against its formula."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from cofitune.errors import UserError
from cofitune.model.anatomy import anatomy_of
from cofitune.model.region import Region
from cofitune.search.proxy import Statistics, first_norm, gradient_norms, rank_correlation, squared_norm

IGNORED = -100


def micro_batches(vocabulary: int, count: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (2, 9), generator=draw)
        labels = ids.clone()
        labels[:, :4] = IGNORED
        labels[1, 7:] = IGNORED
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def plain(model: Any, batches: list[dict[str, Tensor]], power: int) -> dict[str, list[Tensor]]:
    """|gradient| to a power, element by element, summed over micro-batches, of every parameter; all of it kept."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, torch.zeros_like(parameter)) + parameter.grad.abs() ** power
    return {name: value.double() / len(batches) for name, value in sums.items()}  # type: ignore[misc]


def models(folder: Path) -> dict[str, Any]:
    small = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    neox = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return {
        "llama": AutoModelForCausalLM.from_pretrained(folder),
        "gpt2": GPT2LMHeadModel(GPT2Config(**small, resid_pdrop=0.5)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**neox, num_attention_heads=2, max_position_embeddings=32)),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_statistics_are_those_of_a_plain_loop(tiny_model_folder: Path, kind: str) -> None:
    model = models(tiny_model_folder)[kind].eval()
    anatomy = anatomy_of(model)
    batches = micro_batches(model.config.vocab_size)
    for norm, power in ((first_norm, 1), (squared_norm, 2)):
        expected = plain(model, batches, power)
        model.zero_grad()
        result = gradient_norms(model, anatomy, batches, norm)
        for module in anatomy.modules:
            for layer in range(anatomy.num_layers):
                own = 0.0
                for name in anatomy.parameter_names(layer, module):
                    whole, rows = expected[name], anatomy.rows(layer, module)
                    axis = anatomy.row_axis if whole.dim() > 1 else 0  # type: ignore[attr-defined]
                    own += float(whole.index_select(axis, rows).sum())  # type: ignore[attr-defined]
                assert result[module][layer] == pytest.approx(own, rel=1e-4), (module, layer, power)
        assert all(p.grad is None for p in model.parameters()), "every gradient was freed"
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def test_no_item_and_a_gradient_that_is_no_number_are_refused(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    anatomy = anatomy_of(model)
    with pytest.raises(UserError, match="not one item"):
        gradient_norms(model, anatomy, [], first_norm)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        gradient_norms(model, anatomy, micro_batches(50, 1), first_norm)


def test_the_proxy_is_its_formula() -> None:
    modules = ("up_proj", "down_proj")
    draw = random.Random(1)
    gain, harm = ({m: tuple(draw.random() for _ in range(4)) for m in modules} for _ in range(2))
    statistics = Statistics(gain, harm)
    region = Region.span(1, 2, ("up_proj",))
    g = sum(gain["up_proj"][1:3]) / sum(map(sum, gain.values()))
    h = sum(harm["up_proj"][1:3]) / sum(map(sum, harm.values()))
    assert statistics.proxy_score(region, 0.3, 2.0) == pytest.approx(0.3 * 2 * g - 0.7 * 4 * h)
    assert statistics.proxy_score(Region.span(0, 3, modules), 0.5) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="same modules"):
        Statistics(gain, {"up_proj": (1.0,)})


def test_the_rank_correlation_is_that_of_the_ranks() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
