"""Folders that transformers 4 reads as transformers 5 does: its words, and its own answers where it is at hand.

COFITUNE_TRANSFORMERS4=/other/venv/bin/python pytest tests/recipes/test_for_transformers4.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from cofitune.files import write_json
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.export import export
from cofitune.recipes.for_transformers4 import make_readable
from cofitune.training.delta import write_delta

OTHER = os.environ.get("COFITUNE_TRANSFORMERS4")
TEXT = "The court held that the contract was void — 2 plus 2 is four."
TURNS = [{"role": "user", "content": "Is an oral lease binding?"}]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e4}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, rope_parameters=ROPE),
    "yarn": LlamaConfig(**GROUPED, rope_parameters=YARN),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8, rope_parameters=ROPE),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": GPTNeoXConfig(**SIZES, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, rope_parameters=ROPE),
}  # fmt: skip
ASK = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, turns, to = sys.argv[1:]
assert transformers.__version__.startswith("4."), transformers.__version__
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", output_loading_info=True)
assert not any(info.values()), info
tokens = tokenizer(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    save_file({"tokens": tokens, "logits": model.eval()(tokens).logits.float().contiguous()}, to + ".safetensors")
prompt = tokenizer.apply_chat_template(json.loads(turns), add_generation_prompt=True, tokenize=False)
ends = model.generation_config.eos_token_id
json.dump({"prompt": prompt, "ends": ends, "version": transformers.__version__}, open(to + ".json", "w"))
"""


def answers_of_4(folder: Path, to: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What transformers 4, in its own environment, makes of a folder."""
    assert OTHER is not None
    command = [OTHER, "-c", ASK, str(folder), TEXT, json.dumps(TURNS), str(to)]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=own, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(f"{to}.safetensors"), json.loads(Path(f"{to}.json").read_text())


def exported(folder: Path, to: Path) -> Path:
    """A base with all of its layers' weights changed a little, exported as a run of it."""
    weights = {n: t for n, t in AutoModelForCausalLM.from_pretrained(folder).named_parameters() if t.dim() == 2}
    delta = {name: (tensor * 1.01).detach() for name, tensor in weights.items() if ".1." in name}
    about = {
        "base": str(folder), "base_fingerprint": fingerprint(str(folder)), "revision": None, "template": "chat",
        "trust_remote_code": False, "dtype": "float32", "names": {"prefix": "transformer.", "aliases": {}},
    }  # fmt: skip
    run = to.parent / "run" / "train"
    run.mkdir(parents=True)
    write_delta(run, delta, about)
    return export(run, to, console=Console(quiet=True))


@pytest.mark.processes
@pytest.mark.skipif(OTHER is None, reason="COFITUNE_TRANSFORMERS4 names no python with transformers 4")
@pytest.mark.parametrize("family", [*FAMILIES, "SmolLM2"])
def test_transformers_4_gives_the_same_logits_and_tokens(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
    if family != "SmolLM2":
        config = FAMILIES[family]
        config.vocab_size, config.pad_token_id, config.bos_token_id = len(tiny_tokenizer), None, None
        config.eos_token_id = tiny_tokenizer.eos_token_id
        base = tmp_path / "base"
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        tiny_tokenizer.save_pretrained(base)
    elif not base.is_dir():
        pytest.skip("scripts/small_model.py has not run here")
    folder = exported(base, tmp_path / "out")
    found, said = answers_of_4(folder, tmp_path / "answers")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(found["tokens"], tokenizer(TEXT, return_tensors="pt")["input_ids"])
    with torch.no_grad():
        expected = model.eval()(found["tokens"]).logits.float()
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    assert said["prompt"] == tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    assert said["ends"] == model.generation_config.eos_token_id


@pytest.mark.parametrize("family", [*FAMILIES])
def test_transformers_5_reads_the_words_of_both_alike(family: str, tmp_path: Path) -> None:
    FAMILIES[family].save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    make_readable(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert after.get("rope_parameters") == before.get("rope_parameters")
    assert {key: after[key] for key in before} == before


def test_the_settings_of_rope_stand_where_transformers_4_looks(tmp_path: Path) -> None:
    write_json(
        tmp_path / "config.json", {"rope_parameters": YARN, "text_config": {"rope_parameters": {"rope_theta": 7.0}}}
    )
    make_readable(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["rope_theta"] == 5e4 and found["text_config"]["rope_theta"] == 7.0
    assert found["rope_scaling"] == {k: v for k, v in YARN.items() if k != "rope_theta"}
    assert "rope_scaling" not in found["text_config"]


def test_files_that_both_understand_stay_as_they_are(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_theta": 1e4,"model_type":"llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class":"LlamaTokenizerFast"}')
    make_readable(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"rope_theta": 1e4,"model_type":"llama"}'
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"tokenizer_class":"LlamaTokenizerFast"}'


def test_a_tokenizer_of_transformers_5_has_the_class_that_both_know(tmp_path: Path, tiny_model_folder: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    assert json.loads(path.read_text())["tokenizer_class"] == "TokenizersBackend"
    before = AutoTokenizer.from_pretrained(tmp_path / "model")
    make_readable(tmp_path / "model")
    settings = json.loads(path.read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    after = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert after.get_vocab() == before.get_vocab() and after.all_special_ids == before.all_special_ids
    assert after(TEXT) == before(TEXT)
