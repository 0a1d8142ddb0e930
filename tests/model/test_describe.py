"""The proposal for `model.anatomy`: what it says can be pasted, and is what the table says where the table knows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Glm4Config,
    GPT2Config,
    GPTJConfig,
    MptConfig,
    NemotronConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Starcoder2Config,
)

from cofitune.config.region import Anatomy as Described
from cofitune.model.anatomy import anatomy_of
from cofitune.model.describe import how_to_describe
from cofitune.model.layouts import Layout

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "phi3": Phi3Config(**SIZES),
    "glm4": Glm4Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES),
    "nemotron": NemotronConfig(**SIZES, num_key_value_heads=2),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, rotary_dim=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
    "mpt": MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=64),
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_proposed_by_names_is_what_the_table_says(family: str) -> None:
    model = on_meta(FAMILIES[family])
    section = how_to_describe(model).split("so:\n")[1].rsplit("\n", 1)[0]
    pasted = Described.model_validate(yaml.safe_load(section)["model"]["anatomy"])
    described = anatomy_of(model, Layout(**pasted.model_dump()))
    assert described.layout == anatomy_of(model).layout
    assert "…" not in section


def test_a_dropout_that_a_newer_transformers_renamed_is_found() -> None:
    """GPT-J's attention has `attn_dropout` in 5.23 and `attention_dropout` in 5.24."""
    model = on_meta(FAMILIES["gptj"])
    for layer in model.transformer.h:
        vars(layer.attn)["_modules"].pop("attn_dropout", None)
        layer.attn.attention_dropout = 0.0
    assert anatomy_of(model).layout.attention_dropout == "attention_dropout"


def test_names_that_tell_too_little_are_no_proposal() -> None:
    text = how_to_describe(on_meta(BertConfig(**SIZES, is_decoder=True)))
    assert "tell too little" in text and "anatomy:" not in text
    assert "attention.self.query [32, 32]" in text and "output.dense [32, 48]" in text
