"""The anatomy: sizes and shapes of a model, and layouts that are refused by name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GemmaConfig,
    HrmTextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from cofitune.errors import RegionError, UserError
from cofitune.model import anatomy
from cofitune.model.anatomy import OLDEST_TRANSFORMERS, anatomy_of, read_anatomy, read_model_config
from cofitune.model.layouts import GROUPS, MODULES, expand_modules
from cofitune.model.recognise import true_shape
from cofitune.model.region import check_present, match_region, resolve_region

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def test_sizes_of_a_grouped_query_llama(tiny_model_folder: Path) -> None:
    anatomy = read_anatomy(read_model_config(str(tiny_model_folder)))
    assert (anatomy.num_layers, anatomy.num_heads, anatomy.num_key_value_heads) == (4, 4, 2)
    assert (anatomy.head_dim, anatomy.intermediate_size, anatomy.hidden_size) == (8, 48, 32)
    assert anatomy.shapes["model.layers.0.self_attn.k_proj.weight"] == (16, 32)
    assert anatomy.shapes["model.layers.3.mlp.down_proj.weight"] == (32, 48)
    assert len(anatomy.shapes) == 4 * (7 + 2) + 3, "seven weights and two norms a layer; embedding, norm, head"


@pytest.mark.parametrize("make", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Olmo2Config])
def test_the_plain_layout_is_known_in_every_family_as_the_real_model(make: Any) -> None:
    config = make(**SIZES)
    anatomy = read_anatomy(config)
    model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters())
    assert anatomy == anatomy_of(model)
    assert anatomy.num_parameters == sum(p.numel() for p in parameters.values())
    assert set(anatomy.shapes) == set(parameters)
    assert all(tuple(parameters[n].shape) == shape for n, shape in anatomy.shapes.items())
    for layer in range(3):
        for module in MODULES:
            names = list(anatomy.parameter_names(layer, module))
            assert names and names[0].endswith(f"{module}.weight")
    # the sizes that units are counted by agree with the weights
    assert anatomy.shapes["model.layers.0.self_attn.q_proj.weight"][0] == anatomy.num_heads * anatomy.head_dim
    assert anatomy.shapes["model.layers.0.self_attn.k_proj.weight"][0] == anatomy.num_key_value_heads * anatomy.head_dim
    assert anatomy.shapes["model.layers.0.mlp.up_proj.weight"] == (anatomy.intermediate_size, anatomy.hidden_size)


def test_qwen_2_has_biases_on_the_attention_inputs_only() -> None:
    anatomy = read_anatomy(Qwen2Config(**SIZES))
    assert [n.rsplit(".", 1)[-1] for n in anatomy.parameter_names(0, "q_proj")] == ["weight", "bias"]
    assert [n.rsplit(".", 1)[-1] for n in anatomy.parameter_names(0, "o_proj")] == ["weight"]


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_counted_once(tie: bool) -> None:
    anatomy = read_anatomy(LlamaConfig(**SIZES, tie_word_embeddings=tie))
    untied = read_anatomy(LlamaConfig(**SIZES, tie_word_embeddings=False)).num_parameters
    assert anatomy.num_parameters == (untied - 64 * 32 if tie else untied)
    assert ("lm_head.weight" in anatomy.shapes) != tie


def test_a_model_that_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(UserError, match="model type t5 cannot be built"):
        read_anatomy(T5Config())


def test_reading_the_sizes_of_a_13b_builds_no_weights() -> None:
    config = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    assert read_anatomy(config).num_parameters == 13_015_864_320  # LLaMA-13B; in memory it would be 52 GB


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 10**30}, {"num_hidden_layers": 10**400}])
def test_a_config_with_more_layers_than_can_be_built_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="num_hidden_layers is above 10,000"):
        read_anatomy(LlamaConfig(**{**SIZES, **changed}))


def test_a_mixture_of_experts_has_heads_and_no_neurons_that_are_known() -> None:
    anatomy = read_anatomy(MixtralConfig(**SIZES, num_local_experts=2))
    assert anatomy.modules == (*GROUPS["mha"], "experts") and "FFN" in anatomy.unknown
    assert anatomy.converted == {name: (name,) for name in anatomy.shapes if "experts." in name}
    assert match_region(".*experts.*", anatomy).modules == ("experts",)


def test_what_is_one_tensor_in_the_files_trains_together_or_not_at_all() -> None:
    anatomy = read_anatomy(HrmTextConfig(**{**SIZES, "num_layers_per_stack": 1, "head_dim": 8}))
    name = r"model\.L_module\.layers\.0\.mlp\.(gate|up)_proj\.weight"
    check_present(match_region(name, anatomy), anatomy)
    with pytest.raises(RegionError, match="gate_proj.weight and .*up_proj.weight are one tensor in the weight files"):
        check_present(match_region(name.replace("(gate|up)", "gate"), anatomy), anatomy)


def test_a_group_lies_in_the_layers_that_have_it() -> None:
    types = ["conv", "full_attention", "conv"]
    anatomy = read_anatomy(Lfm2Config(**SIZES, layer_types=types, block_auto_adjust_ff_dim=False))
    assert anatomy.modules == MODULES
    assert [anatomy.has(layer, "q_proj") for layer in range(3)] == [False, True, False]
    assert all(anatomy.has(layer, "up_proj") for layer in range(3)) and not anatomy.is_whole
    assert resolve_region("all", ["mha"], 3, MODULES).parameter_names(anatomy) == [
        f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    with pytest.raises(RegionError, match="layers 0 have none of these modules: q_proj is in layers 1"):
        check_present(resolve_region("0", ["q_proj"], 3, MODULES), anatomy)


def test_a_model_of_no_known_layout_trains_by_name() -> None:
    anatomy = read_anatomy(BertConfig(**{**SIZES, "is_decoder": True}))
    assert anatomy.modules == () and len(anatomy.linear) == 3 * 6
    assert match_region(r"bert\.encoder\.layer\.2\..*", anatomy).first == 0, "who knows what feeds what"
    with pytest.raises(UserError, match="importance needs heads and neurons.*bert.*What needs none: region.match"):
        anatomy.check_units("importance")


def test_groups() -> None:
    assert expand_modules(["all"]) == expand_modules(("ffn", "mha")) == MODULES
    assert expand_modules(["down_proj", "up_proj", "up_proj"]) == ("up_proj", "down_proj")
    assert set(GROUPS["mha"]).isdisjoint(GROUPS["ffn"])
    for wrong in ("mlp", "lm_head", "up_proj "):
        with pytest.raises(RegionError, match="names no module"):
            expand_modules([wrong])
    with pytest.raises(RegionError, match="^region.modules: 'up' names no module; did you mean 'up_proj'"):
        expand_modules(["up"], key="region.modules")  # as regions are printed


def test_under_zero_3_the_true_shape_is_deepspeeds() -> None:
    parameter: Any = nn.Parameter(torch.empty(0))
    assert true_shape(parameter) == (0,)
    parameter.ds_shape = torch.Size([4, 3])
    assert true_shape(parameter) == (4, 3)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name: .*none: no such folder"):
        read_model_config(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: this model config is damaged"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")
    with pytest.raises(UserError, match="unheard_of"):
        read_model_config(str(tmp_path))


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    assert any(line.startswith(f"transformers>={oldest},") for line in project["dependencies"])
    monkeypatch.setattr(anatomy.transformers, "__version__", "5.20.3")
    with pytest.raises(UserError, match=rf"transformers 5.20.3 is installed, and cofitune needs {oldest} or later"):
        read_model_config(str(tiny_model_folder))
    monkeypatch.setattr(anatomy.transformers, "__version__", "6.0.0.dev0")
    assert read_model_config(str(tiny_model_folder)).model_type == "llama"
