"""Which class builds a base, and what is refused because it is no causal language model."""

from __future__ import annotations

import pytest
from transformers import (
    BertConfig,
    Blip2Config,
    CTRLConfig,
    Emu3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    ReformerConfig,
    XLMConfig,
    XLNetConfig,
)

from cofitune.errors import UserError
from cofitune.model.anatomy import read_anatomy
from cofitune.model.kind import auto_class
from cofitune.recipes.train.resolve import check_recomputation

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(**SMALL), "bert attends in both directions .is_decoder is false in its config.json"),
        (XLMConfig(emb_dim=32, n_layers=2, n_heads=4, n_words=64), "xlm attends in both directions .causal is false"),
        (
            Gemma3TextConfig(**SMALL, use_bidirectional_attention=True, pad_token_id=0),
            "gemma3_text attends in both directions .use_bidirectional_attention",
        ),
        (PaliGemmaConfig(), "paligemma reads its prompt in both directions"),
        (Blip2Config(), "blip-2 answers nothing without an image: it is no causal"),
        (ReformerConfig(is_decoder=True), "reformer trains only on sequences whose length is a multiple of its"),
        (XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64), "in an order of its own"),
    ],
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_anatomy(config)


def test_a_causal_model_whose_config_says_the_same_is_not() -> None:
    config = GPTNeoXConfig(**SMALL)
    assert config.is_decoder is False and read_anatomy(config).num_layers == 2


def test_a_model_with_images_is_taken_whole_where_its_files_are() -> None:
    assert auto_class(LlamaConfig()).__name__ == "AutoModelForCausalLM"
    assert auto_class(Qwen2_5_VLConfig()).__name__ == "AutoModelForImageTextToText", "there is no other class"
    assert auto_class(Emu3Config()).__name__ == "AutoModelForCausalLM"
    whole = Emu3Config(architectures=["Emu3ForConditionalGeneration"])
    assert auto_class(whole).__name__ == "AutoModelForImageTextToText"


def test_recomputation_is_refused_where_a_model_has_none() -> None:
    anatomy = read_anatomy(CTRLConfig(n_embd=32, dff=48, n_layer=2, n_head=4, vocab_size=64))
    check_recomputation(False, anatomy)
    check_recomputation("auto", anatomy)
    with pytest.raises(UserError, match="train.gradient_checkpointing: model type ctrl cannot .*; set it to false"):
        check_recomputation(True, anatomy)
