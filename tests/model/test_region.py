"""The region: ranges that tile every depth, the authors' table, and counts by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.errors import RegionError
from cofitune.model.anatomy import Anatomy, anatomy_of, read_anatomy
from cofitune.model.region import NAMED_RANGES, Region, freeze_outside, layer_range, resolve_region

QUARTERS = ("bottom1", "bottom2", "middle", "top")
# docs/regions.md, the layer ranges of the authors' scripts
AUTHORS = {
    "bottom1": ((0, 7), (0, 9)),
    "bottom2": ((8, 15), (10, 19)),
    "middle": ((16, 23), (20, 29)),
    "top": ((24, 31), (30, 39)),
    "bottom-plus": ((0, 15), (0, 19)),
    "middle-plus": ((8, 23), (10, 29)),
    "top-plus": ((16, 31), (20, 39)),
}


def llama(**sizes: int) -> Anatomy:
    return read_anatomy(LlamaConfig(**sizes))


def layers_of(text: str, depth: int) -> list[int]:
    """The layers of a range, none where the range is refused as empty."""
    try:
        first, last = layer_range(text, depth)
    except RegionError as error:
        assert "holds no layer" in str(error)
        return []
    return list(range(first, last + 1))


@pytest.mark.parametrize("names", [QUARTERS, ("0%-25%", "25%-50%", "50%-75%", "75%-100%"), ("bottom-plus", "top-plus")])
def test_the_parts_tile_every_depth_without_gap_or_overlap(names: tuple[str, ...]) -> None:
    for depth in range(1, 101):
        assert [layer for name in names for layer in layers_of(name, depth)] == list(range(depth)), depth


def test_thirds_that_are_no_round_percentages_tile_too() -> None:
    for depth in range(1, 101):
        parts = ("0%-33.3%", "33.3%-66.7%", "66.7%-100%")
        assert [layer for name in parts for layer in layers_of(name, depth)] == list(range(depth)), depth


@pytest.mark.parametrize("name", AUTHORS)
def test_the_names_are_the_authors_table(name: str) -> None:
    assert (layer_range(name, 32), layer_range(name, 40)) == AUTHORS[name]


def test_halves_are_two_quarters() -> None:
    for depth in range(4, 101):
        assert layers_of("bottom-plus", depth) == layers_of("bottom1", depth) + layers_of("bottom2", depth)
        assert layers_of("middle-plus", depth) == layers_of("bottom2", depth) + layers_of("middle", depth)
        assert layers_of("all", depth) == list(range(depth))


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("8-15", (8, 15)),
        (" 8 - 15 ", (8, 15)),
        ("3", (3, 3)),
        ("0-31", (0, 31)),
        (" top ", (24, 31)),
        ("0% - 3.2%", (0, 1)),
    ],
)
def test_how_a_range_is_written(text: str, result: tuple[int, int]) -> None:
    assert layer_range(text, 32) == result


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("bottm2", "did you mean 'bottom2'"),
        ("15-8", "runs backwards"),
        ("8-32", "whose 32 layers are 0-31"),
        ("32", "whose 32 layers are 0-31"),
        ("50%-25%", "holds no layer"),
        ("50%-50%", "holds no layer"),
        ("0%-101%", "beyond 100 %"),
        ("-1", "no layer range"),
        ("", "no layer range"),
        ("25-50%", "no layer range"),
        ("1,2", "no layer range"),
    ],
)
def test_what_is_no_range_is_refused(text: str, output: str) -> None:
    with pytest.raises(RegionError, match=output):
        layer_range(text, 32)


def test_groups_and_repetitions_become_modules_in_the_layers_order() -> None:
    region = resolve_region("top", ["down_proj", "mha", "q_proj"], 4)
    assert region == Region.span(3, 3, ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
    assert str(region) == "layers 3 × q_proj, k_proj, v_proj, o_proj, down_proj"
    with pytest.raises(RegionError, match="did you mean 'down_proj'"):
        resolve_region("top", ["downproj"], 4)


@pytest.mark.parametrize(
    ("sizes", "trained", "share"),
    [
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 721_420_288, 10.7),
        (
            {
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 40,
            },
            1_415_577_600,
            10.9,
        ),
    ],
)
def test_the_papers_region_has_the_papers_size(sizes: dict[str, int], trained: int, share: float) -> None:
    anatomy = llama(vocab_size=32000, **sizes)
    region = resolve_region("25%-50%", ["up_proj", "down_proj"], anatomy.num_layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    by_hand = 0
    for layer in range(sizes["num_hidden_layers"] // 4, sizes["num_hidden_layers"] // 2):
        mlp = model.model.layers[layer].mlp
        by_hand += mlp.up_proj.weight.numel() + mlp.down_proj.weight.numel()
    assert region.num_parameters(anatomy) == by_hand == trained
    assert round(100 * trained / sum(p.numel() for p in model.parameters()), 1) == share


def test_biases_belong_to_their_module() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    anatomy = read_anatomy(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    names = Region.span(1, 1, ("q_proj", "up_proj")).parameter_names(anatomy)
    assert names == [
        f"model.layers.1.{name}.{kind}" for name in ("self_attn.q_proj", "mlp.up_proj") for kind in ("weight", "bias")
    ]
    assert Region.span(1, 1, ("q_proj", "up_proj")).num_parameters(anatomy) == 32 * 32 + 32 + 48 * 32 + 48


def test_containment() -> None:
    big = Region.span(2, 5, ("q_proj", "up_proj"))
    assert big.inside(big)
    assert Region.span(3, 4, ("up_proj",)).inside(big)
    assert not Region.span(1, 4, ("up_proj",)).inside(big)
    assert not Region.span(3, 6, ("up_proj",)).inside(big)
    assert not Region.span(3, 4, ("k_proj",)).inside(big)
    assert list(big.layers) == [2, 3, 4, 5]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
    )


def test_exactly_the_region_is_left_trainable(tiny: nn.Module) -> None:
    anatomy = anatomy_of(tiny)
    region = Region.span(1, 2, ("up_proj", "k_proj"))
    freeze_outside(tiny, set(region.parameter_names(anatomy)))
    trained = {n for n, p in tiny.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.{m}.weight" for i in (1, 2) for m in ("mlp.up_proj", "self_attn.k_proj")}
    assert sum(p.numel() for p in tiny.parameters() if p.requires_grad) == region.num_parameters(anatomy)
    freeze_outside(tiny, {"model.norm.weight"})
    assert {n for n, p in tiny.named_parameters() if p.requires_grad} == {"model.norm.weight"}, "it also freezes anew"


def test_a_name_that_matches_nothing_or_an_empty_region_is_refused(tiny: nn.Module) -> None:
    with pytest.raises(RegionError, match=r"model\.layers\.9"):
        freeze_outside(tiny, {"model.layers.9.mlp.up_proj.weight", "model.norm.weight"})
    with pytest.raises(RegionError, match="it is empty"):
        freeze_outside(tiny, set())


def test_named_ranges_are_written_as_percentages_of_the_depth() -> None:
    for name, (low, high) in NAMED_RANGES.items():
        for depth in (4, 7, 30, 32, 40):
            assert layer_range(name, depth) == (math.ceil(depth * low / 100), math.ceil(depth * high / 100) - 1)
