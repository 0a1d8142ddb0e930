"""Every causal language model of the installed transformers, made tiny from its config class, and tried once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.model.anatomy import Anatomy, read_anatomy
from tests.helpers import write_jsonl

_NAMES = {  # a size → what families call it
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size attention_hidden_size out_hidden_size",
    48: "intermediate_size n_inner ffn_dim dff d_ff decoder_ffn_dim encoder_ffn_dim d_inner hidden_dim dim_ff "
    "dense_intermediate_size shared_intermediate_size input_embedding_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts zero_expert_num mamba_n_heads mamba_num_heads",
    2: "num_key_value_heads linear_num_key_heads num_experts_per_tok moe_k depth",
    1: "n_group topk_group",
    3: "in_channels",
    8: "head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim global_head_dim "
    "qk_rope_head_dim rotary_dim index_head_dim",
    14: "patch_size",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
    "kv_lora_rank hidden_size_per_layer_input output_embedding_size o_lora_rank dim_head linear_head_dim mamba_d_state "
    "ssm_state_size pronunciation_embed_dim shape_embed_dim swa_head_dim mamba_headdim mamba_d_head mamba_head_dim "
    "rel_extent",
    28: "image_size",
    64: "mamba_d_ssm",
    256: "max_position_embeddings n_positions max_sequence_length max_seq_len",
    400: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size unpadded_vocab_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TYPES = ["linear_attention", "full_attention"] * 2
EXTRA: dict[str, dict[str, Any]] = {  # what a family's own checks ask for besides
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "num_experts_per_tok": 0},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen3_next": {"layer_types": TYPES},
    "qwen3_5_text": {"layer_types": TYPES},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "mlp"]},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "dots1": {"n_shared_experts": 1},
}


def tiny_config(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of a class with four layers, hidden size 32 and 400 tokens, as far as it has such sizes."""
    return kind(**_sizes(kind, kind))


def _sizes(kind: type[PretrainedConfig], outer: type[PretrainedConfig]) -> dict[str, Any]:
    default = kind()
    known = {**default.to_dict(), **dict.fromkeys(kind.attribute_map)}
    parts = {
        name: _sizes(type(getattr(default, name)), outer)
        for name in kind.sub_configs
        if isinstance(getattr(default, name, None), PretrainedConfig)
    }
    plain = {name: value for name, value in SIZES.items() if name in known and name not in parts}
    return {**plain, **parts, **EXTRA.get(kind.model_type, {})}


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    Attributes:
        attention, ffn: how many of its layers have heads, and neurons, that are known.
        trained: by which region it was trained for two steps, or empty.
        reason: why it was not, or why fewer units are known.
    """

    attention: int = 0
    ffn: int = 0
    layers: int = 0
    trained: str = ""
    reason: str = ""


def try_family(kind: type[PretrainedConfig], folder: Path, tokenizer: Any) -> Outcome:
    """Train a tiny model of a family for two steps, export it, and compare what the folder answers.

    Raises:
        AssertionError: something that was frozen moved, or the exported model answers otherwise than the trained one.
    """
    try:
        config = tiny_config(kind)
        anatomy = read_anatomy(config)
    except Exception as error:  # noqa: BLE001 -- a family's own checks raise anything; the table shows it
        return Outcome(reason=f"no tiny model of it can be built: {str(error).strip().splitlines()[0][:90]}")
    heads, neurons = (sum(anatomy.has(i, m) for i in range(anatomy.num_layers)) for m in ("o_proj", "down_proj"))
    seen = Outcome(heads, neurons, anatomy.num_layers)
    try:
        make_folder(config, folder / "model", tokenizer)
        trained = train_and_compare(folder, anatomy)
    except UserError as error:
        return replace(seen, reason=str(error).splitlines()[0])
    return replace(seen, trained=trained, reason=anatomy.unknown)


def make_folder(config: PretrainedConfig, folder: Path, tokenizer: Any) -> None:
    """Write a random model of a config, and a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_and_compare(folder: Path, anatomy: Anatomy) -> str:
    """Train `folder/model`, export it and compare; returns the region that was trained, in a word."""
    from cofitune.recipes.export import export
    from cofitune.recipes.train.recipe import train

    words = ("court", "lease", "Paris", "buyer")
    data = write_jsonl(folder / "data.jsonl", ({"instruction": f"Say {w}", "output": w} for w in words))
    by_units = bool(anatomy.modules)
    names = [n for n in anatomy.shapes if n.startswith(f"{anatomy.layout.layers}.") and n not in anatomy.converted]
    region = {"layers": "all", "modules": ["all"]} if by_units else {"match": "|".join(map(re.escape, names))}
    config = Config.model_validate(
        {
            "model": {"name": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(data), "max_length": 48},
            "region": region,
            "softmask": {"apply_to": "none"},
            "train": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2, "prefix_cache": "none"},
            "output_dir": str(folder / "run"),
        }
    )
    quiet = Console(quiet=True)
    train(config, console=quiet)
    export(folder / "run", folder / "out", console=quiet)
    compare_export(folder)
    return "modules" if by_units else "match"


def compare_export(folder: Path) -> None:
    """What is exported is the base with the delta in its place: file by file, and in what it answers."""
    from cofitune.model.load import load_model
    from cofitune.model.weight_files import fingerprint
    from cofitune.training.delta import apply_delta, read_delta

    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    delta = read_delta(folder / "run" / "train", fingerprint(str(folder / "model")))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert 0 < len(moved) <= len(delta.tensors)
    models = [load_model(str(folder / name), torch.float32).eval() for name in ("model", "out")]
    apply_delta(models[0], delta)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = [m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in models]
    assert torch.equal(*answers)
