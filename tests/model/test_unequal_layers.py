"""Layers of unequal sizes: heads of unequal width, fewer key/value heads, a wider FFN, each with units of its own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Gemma4TextConfig, PreTrainedModel

from cofitune.data.batches import plan_steps
from cofitune.data.chat import Example
from cofitune.importance.gates import virtual_gates
from cofitune.importance.normalize import rank
from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, layer_units, unit_counts
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.model.region import freeze_outside, resolve_region
from cofitune.softmask.factors import build_factors, shuffle_units
from cofitune.softmask.update import mask_updates
from cofitune.training.activations import Activations
from cofitune.training.delta import collect
from cofitune.training.engine import release, start_distributed, start_engine
from cofitune.training.loop import FitSettings, fit
from cofitune.zero import inner_optimizer, shards
from tests.families import compare_export
from tests.helpers import run_command, write_jsonl
from tests.model.test_layouts import SETTINGS

H, A, V = 32, 4, 416
SIZES: dict[str, Any] = {
    "hidden_size": H, "num_attention_heads": A, "vocab_size": V, "intermediate_size": 48, "num_key_value_heads": 2,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma3n": lambda: Gemma3nTextConfig(
        **{**SIZES, "intermediate_size": [40, 48]},
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=V,
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **SIZES,
        num_hidden_layers=4,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=V,
    ),
}
# heads, key/value heads, width of a head, neurons; by hand
EXPECTED = {
    "gemma3n": [(4, 2, 8, 40), (4, 2, 8, 48)],
    "gemma4": [(4, 2, 8, 48), (4, 2, 16, 48), (4, 2, 8, 96), (4, 2, 16, 96)],
}
SHARED = {"gemma4": (2, 3)}  # layers that read keys and values of lower ones
QKV, FFN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def build(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_ids() -> Tensor:
    return torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(0))


def modules_of(family: str, layer: int) -> list[str]:
    return ["q_proj", *(() if layer in SHARED.get(family, ()) else ("k_proj", "v_proj")), "o_proj", *FFN]


def weight_of(model: PreTrainedModel, layer: int, module: str) -> Any:
    part = "mlp" if module in FFN else "self_attn"
    return model.get_submodule(f"model.layers.{layer}.{part}.{module}").weight


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_has_sizes_of_its_own(family: str) -> None:
    model = build(family)
    anatomy = anatomy_of(model)
    found = [(s.num_heads, s.num_key_value_heads, s.head_dim, s.intermediate_size) for s in anatomy.sizes]
    assert found == EXPECTED[family]
    assert [[m for m in anatomy.modules if anatomy.has(i, m)] for i in range(anatomy.num_layers)] == [
        modules_of(family, i) for i in range(anatomy.num_layers)
    ]
    for layer in range(anatomy.num_layers):
        region = resolve_region(str(layer), ["all"], anatomy.num_layers, anatomy.modules)
        by_hand = sum(weight_of(model, layer, module).numel() for module in modules_of(family, layer))
        assert region.num_parameters(anatomy) == by_hand
    assert layer_units(anatomy, FFN_NEURONS) == tuple(neurons for *_, neurons in EXPECTED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_the_units_own_weights_scaled(family: str) -> None:
    model = build(family)
    direction = torch.randn(4, 9, V, generator=torch.Generator().manual_seed(1))
    with virtual_gates(model, 0.0) as gates:
        leaves = gates.renew(4)
        loss = (model(random_ids(), use_cache=False).logits * direction).sum()
        flat = iter(torch.autograd.grad(loss, [gate for kind in leaves.values() for gate in kind]))
        got = {kind: [next(flat).sum(0) for _ in layers] for kind, layers in leaves.items()}
    (model(random_ids(), use_cache=False).logits * direction).sum().backward()
    for layer, (heads, _, width, _) in enumerate(EXPECTED[family]):
        scaled_out, scaled_down = (w * w.grad for w in (weight_of(model, layer, m) for m in ("o_proj", "down_proj")))
        by_column = scaled_out.sum(0)
        by_hand = {
            ATTENTION_HEADS: torch.stack([by_column[width * a : width * (a + 1)].sum() for a in range(heads)]),
            FFN_NEURONS: scaled_down.sum(0),
            FFN_OUTPUTS: scaled_down.sum(1),
        }
        for kind, expected in by_hand.items():
            torch.testing.assert_close(got[kind][layer], expected.detach(), rtol=1e-3, atol=1e-3)


def random_importance(anatomy: Anatomy) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    importance = {}
    for kind, most in unit_counts(anatomy).items():
        importance[kind] = torch.rand(anatomy.num_layers, most, generator=generator)
        importance[kind][:, 1] = 1.0
        for layer, count in enumerate(layer_units(anatomy, kind)):
            importance[kind][layer, count:] = torch.nan
    return importance


def factor_of(importance: dict[str, Tensor], size: tuple[int, ...], layer: int, module: str, weight: Tensor) -> Tensor:
    """The factor of each element, unit by unit."""
    heads, groups, width, neurons = size
    factor = torch.ones_like(weight)
    for unit in range(heads if module in (*QKV, "o_proj") else neurons if module != "down_proj" else H):
        if module == "o_proj":
            factor[:, width * unit : width * (unit + 1)] = 1 - importance[ATTENTION_HEADS][layer, unit]
        elif module == "q_proj":
            factor[width * unit : width * (unit + 1)] = 1 - importance[ATTENTION_HEADS][layer, unit]
        elif module in QKV:
            served = unit // (heads // groups)
            own = importance[ATTENTION_HEADS][layer, heads // groups * served : heads // groups * (served + 1)]
            factor[width * served : width * (served + 1)] = 1 - own.max()
        else:
            kind = FFN_OUTPUTS if module == "down_proj" else FFN_NEURONS
            factor[unit] = 1 - importance[kind][layer, unit]
    return factor


@pytest.mark.processes
@pytest.mark.parametrize("family", FAMILIES)
def test_two_masked_steps_are_a_plain_loops_element_by_element(family: str) -> None:
    start_distributed()
    model, twin = build(family), build(family)
    anatomy = anatomy_of(model)
    depth = anatomy.num_layers
    importance = random_importance(anatomy)
    twin.requires_grad_(False)
    trained = {(i, m): weight_of(twin, i, m).requires_grad_() for i in range(1, depth) for m in modules_of(family, i)}
    factors = {(i, m): factor_of(importance, EXPECTED[family][i], i, m, w) for (i, m), w in trained.items()}
    before = {key: w.detach().clone() for key, w in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        logits = twin(random_ids(), use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), random_ids()[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        old = {key: w.detach().clone() for key, w in trained.items()}
        optimizer.step()
        with torch.no_grad():
            for key, w in trained.items():
                w.copy_(old[key] + factors[key] * (w - old[key]))
    region = resolve_region(f"1-{depth - 1}", ["all"], depth, anatomy.modules)
    freeze_outside(model, set(region.parameter_names(anatomy)))
    engine = start_engine(model, replace(SETTINGS, zero_stage=3))
    mask_updates(inner_optimizer(engine), shards(engine), build_factors(importance, region, region.modules, anatomy))
    examples = [Example(ids, ids) for ids in random_ids().tolist()]
    fit(engine, examples, FitSettings(plan_steps(4, 4, 1, 1, 1, 2), 0, 0), lambda record, step: None)
    whole = collect(model, region.parameter_names(anatomy))
    release(engine)
    assert len(whole) == len(trained)
    for (layer, module), expected in trained.items():
        part = "mlp" if module in FFN else "self_attn"
        moved = whole[f"model.layers.{layer}.{part}.{module}.weight"] - before[layer, module]
        should = expected.detach() - before[layer, module]
        assert should.norm() > 1e-3 * before[layer, module].norm()
        assert (moved - should).norm() <= 2e-3 * should.norm(), (layer, module)


def test_a_shuffled_mask_stays_among_a_layers_own_units() -> None:
    anatomy = anatomy_of(build("gemma4"))
    importance = random_importance(anatomy)
    for kind, vectors in shuffle_units(importance, anatomy, 0).items():
        for layer, count in enumerate(layer_units(anatomy, kind)):
            own, other = importance[kind][layer, :count], vectors[layer, :count]
            assert torch.equal(own.sort().values, other.sort().values) and not torch.equal(own, other)
            assert vectors[layer, count:].isnan().all()


def test_a_wider_layer_is_estimated_to_keep_more() -> None:
    """Two layers that differ in their FFN's width alone: three numbers more a neuron and token."""
    anatomy = anatomy_of(build("gemma4"))
    region = resolve_region("0-3", ["ffn"], 4, anatomy.modules)
    kept = [Activations(anatomy, region, 4, 1).of_layer(layer) for layer in range(1, 4)]
    assert kept[2] - kept[0] == (96 - 48) * 4 * 4


@pytest.mark.processes
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_train_and_export(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(
        tmp_path / "data.jsonl",
        ({"instruction": f"Say {w}", "output": w} for w in ("court", "lease", "Paris", "buyer")),
    )
    config = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": str(data), "max_length": 64},
        "importance": {"data": str(data), "per_device_batch_size": 2},
        "region": {"layers": "all", "modules": ["q_proj", "o_proj", "ffn"]},
        "softmask": {"apply_to": "update"},
        "train": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert run_command(monkeypatch, "importance", path) == 0
    folder = tmp_path / "run/importance"
    vectors, scores = (load_file(folder / f"{name}.safetensors") for name in ("importance", "scores"))
    neurons = [neurons for *_, neurons in EXPECTED[family]]
    for layer, count in enumerate(neurons):
        own = scores[FFN_NEURONS][layer : layer + 1, :count]
        assert torch.equal(vectors[FFN_NEURONS][layer, :count], rank(own)[0])
        assert vectors[FFN_NEURONS][layer, count:].isnan().all() and scores[FFN_NEURONS][layer, count:].isnan().all()
    with (folder / "spread.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == FFN_NEURONS]
    assert [int(row["units"]) for row in rows] == neurons and "nan" not in str(rows)
    assert run_command(monkeypatch, "train", path) == 0
    assert run_command(monkeypatch, "export", tmp_path / "run", "--to", tmp_path / "out") == 0
    compare_export(tmp_path)
