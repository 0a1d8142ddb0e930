"""Other layouts, other regions: train and export through the command line, and what is refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
)

from cofitune.errors import RegionError, UserError
from cofitune.model.anatomy import read_anatomy
from cofitune.model.layouts import Layout
from cofitune.model.region import layer_set, match_region
from tests.families import compare_export
from tests.helpers import run_command, write_jsonl

pytestmark = pytest.mark.processes

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
OPT: dict[str, Any] = {
    "layers": "model.decoder.layers",
    "modules": {
        "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.out_proj", "up_proj": "fc1", "down_proj": "fc2",
    },
    "attention": "self_attn",
    "attention_dropout": "dropout",
}  # fmt: skip
MODELS: dict[str, Any] = {
    "phi3": lambda: Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400),
    "bert": lambda: BertConfig(**SIZES, intermediate_size=48, is_decoder=True),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256),
}


def write_run(folder: Path, family: str, tokenizer: Any, **sections: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[family]()).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    items = [{"instruction": f"Say {w}", "output": w} for w in ("court", "lease", "Paris", "buyer")]
    write_jsonl(folder / "data.jsonl", items)
    config: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "data.jsonl"), "max_length": 64},
        "importance": {"data": str(folder / "data.jsonl"), "estimator": "kl_dropout", "dropout": 0.1},
        "train": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2},
        "output_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, **sections}))
    return path


@pytest.mark.parametrize("family", [family for family in MODELS if family != "bert"])
def test_importance_train_and_export(
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    region = {"layers": "1", "modules": ["q_proj", "up_proj", "down_proj"]}
    path = write_run(tmp_path, family, tiny_tokenizer, region=region, softmask={"apply_to": "update"})
    model = tmp_path / "model/model.safetensors"
    if family == "gpt2":  # as the hub's own file, whose names lack the prefix
        bare = {name.removeprefix("transformer."): t for name, t in load_file(model).items()}
        save_file(bare, model, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert run_command(monkeypatch, "importance", str(path)) == 0
    assert run_command(monkeypatch, "train", str(path)) == 0
    assert "unchanged, bit for bit" in capsys.readouterr().out
    assert run_command(monkeypatch, "export", str(tmp_path / "run"), "--to", str(tmp_path / "out")) == 0
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    delta = load_file(tmp_path / "run/train/delta.safetensors")
    moved = {name for name in base if not torch.equal(base[name], out[name])}
    assert moved == set(delta)
    assert all(torch.equal(out[name], tensor) for name, tensor in delta.items())


def test_a_regex_trains_exactly_what_it_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = r"transformer\.(h\.1\.(ln_1|mlp\.c_fc)\..*|wte\.weight)"
    path = write_run(tmp_path, "gpt2", tiny_tokenizer, region={"match": pattern})
    assert run_command(monkeypatch, "train", str(path)) == 0
    output = capsys.readouterr().out
    assert (
        "transformer.wte.weight (tied to lm_head.weight)" in output
        and "transformer.h.*.ln_1.weight in 1 layers" in output
    )
    delta = load_file(tmp_path / "run/train/delta.safetensors")
    assert set(delta) == {
        "transformer.wte.weight", "transformer.h.1.ln_1.weight", "transformer.h.1.ln_1.bias",
        "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias",
    }  # fmt: skip
    assert run_command(monkeypatch, "train", str(tmp_path / "run/train/config.yaml")) == 0, (
        "the resolved config repeats it"
    )
    assert "already trained" in capsys.readouterr().out
    assert run_command(monkeypatch, "train", str(path), "region.layers=1", "--overwrite") == 2
    assert "match takes the place of layers and modules" in capsys.readouterr().err


def test_what_a_regex_may_not_match_and_how_deep_it_reaches() -> None:
    anatomy = read_anatomy(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64))
    with pytest.raises(RegionError, match=r"matches no parameter's whole name.*did you mean 'transformer.h.1.mlp.c_fc"):
        match_region(r"transformer\.h\.1\.mlp\.c_fcc\.weight", anatomy)
    with pytest.raises(RegionError, match="tied to transformer.wte.weight"):
        match_region("lm_head.*", anatomy)
    assert match_region(r".*\.h\.[12]\.ln_1\..*", anatomy).first == 1
    assert match_region(r".*\.wpe\..*", anatomy).first == 0, "positions feed the lowest layer"
    untied = read_anatomy(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert match_region("lm_head.weight", untied).first == 1, "the head lies above all layers"


def test_layers_as_lists() -> None:
    assert layer_set("0-3, 8,50%-75%", 16) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert layer_set("top,bottom1", 8) == (0, 1, 6, 7)
    with pytest.raises(RegionError, match="did you mean 'bottom2'"):
        layer_set("0-1,botom2", 8)


def test_a_described_layout_is_compared_with_the_model() -> None:
    assert read_anatomy(MODELS["opt"](), described=Layout(**OPT)).modules == tuple(OPT["modules"])
    wrong = {**OPT, "modules": {**OPT["modules"], "up_proj": "fc2", "down_proj": "fc1"}}
    with pytest.raises(UserError, match="should then hold"):
        read_anatomy(MODELS["opt"](), described=Layout(**wrong))
    lost = {**OPT, "modules": {**OPT["modules"], "up_proj": "fc3"}}
    with pytest.raises(UserError, match="has no linear module 'fc3' in layer 0; a layer of .* fc1 "):
        read_anatomy(MODELS["opt"](), described=Layout(**lost))


@pytest.mark.parametrize("section", ["region", "adapter"])
def test_a_model_of_no_known_layout_trains(
    section: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By name, or by an adapter on all that is linear; a region by layers and modules says why it cannot."""
    own: Any = {"match": r"bert\.encoder\.layer\.1\..*"} if section == "region" else {"kind": "lora"}
    path = write_run(tmp_path, "bert", tiny_tokenizer, softmask={"apply_to": "none"}, **{section: own})
    assert run_command(monkeypatch, "train", str(path)) == 0
    assert "unchanged, bit for bit" in capsys.readouterr().out
    delta = load_file(tmp_path / "run/train/delta.safetensors")
    assert len(delta) == (16 if section == "region" else 2 * 6)
    assert run_command(monkeypatch, "export", str(tmp_path / "run"), "--to", str(tmp_path / "out")) == 0
    compare_export(tmp_path)
    for command in (("train", "region={}", "adapter=null"), ("importance",)):
        assert run_command(monkeypatch, command[0], str(path), *command[1:], f"output_dir={tmp_path}/other") == 2
        message = capsys.readouterr().err
        assert "needs heads and neurons" in message and "tell too little for a proposal" in message


def test_a_gate_that_the_model_lacks_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, "gpt2", tiny_tokenizer, region={"layers": [0, "1"], "modules": ["gate_proj"]})
    assert run_command(monkeypatch, "train", str(path)) == 2
    assert "this model has no 'gate_proj'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
