"""Every causal language model of the installed transformers, made tiny from its config class, and tried once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.model.anatomy import Anatomy, read_anatomy
from cofitune.model.kind import OTHERS, auto_class
from tests.helpers import write_jsonl

_NAMES = {  # a size → what families call it
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size embedding_dim hidden_size_global adapter_in_dim "
    "nemo_conv_channels adapter_input_size adapter_out_dim "
    "attention_hidden_size out_hidden_size vision_output_dim projector_input_dim projector_output_dim",
    48: "intermediate_size n_inner ffn_dim dff d_ff decoder_ffn_dim encoder_ffn_dim d_inner hidden_dim dim_ff "
    "dense_intermediate_size shared_intermediate_size input_embedding_size intermediate_size_mlp",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads linear_num_heads linear_num_value_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts zero_expert_num mamba_n_heads mamba_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_blocks num_encoder_layers num_key_value_heads linear_num_key_heads num_experts_per_tok moe_k depth",
    1: "n_group topk_group first_k_dense_replace",
    3: "in_channels",
    8: "head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim global_head_dim "
    "qk_rope_head_dim rotary_dim index_head_dim",
    14: "patch_size",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
    "kv_lora_rank hidden_size_per_layer_input output_embedding_size o_lora_rank dim_head linear_head_dim mamba_d_state "
    "ssm_state_size pronunciation_embed_dim shape_embed_dim swa_head_dim mamba_headdim mamba_d_head mamba_head_dim "
    "rel_extent chunk_size mamba_chunk_size",
    28: "image_size",
    64: "mamba_d_ssm",
    256: "max_position_embeddings n_positions max_sequence_length max_seq_len",
    416: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size unpadded_vocab_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXTRA: dict[str, dict[str, Any]] = {  # what a family's own checks ask for besides
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64,
        },
    },
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_compress_ratio": 4,
        "indexer_budget": 8,
        "ple_embed_dim": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama4": {"architectures": ["Llama4ForConditionalGeneration"]},  # as its files say; there is one without images
    "llama4_text": {"moe_layers": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["attention", "mlp"]},
    **{
        f"{kind}_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
        for kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "shared_experts_intermediate_size": 16,
    },
}  # fmt: skip


def tiny_config(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of a class with two layers, hidden size 32 and 416 tokens, as far as it has such sizes."""
    return kind(**_sizes(kind, kind))


def _sizes(kind: type[PretrainedConfig], outer: type[PretrainedConfig]) -> dict[str, Any]:
    default = kind()
    known = {**default.to_dict(), **dict.fromkeys(kind.attribute_map)}
    parts = {
        name: _sizes(type(getattr(default, name)), outer)
        for name in kind.sub_configs
        if isinstance(getattr(default, name, None), PretrainedConfig)
    }
    plain: dict[str, Any] = {name: value for name, value in SIZES.items() if name in known and name not in parts}
    if "kv_lora_rank" in known:  # latent attention has as many keys and values as queries
        plain["num_key_value_heads"] = 4
    if known.get("is_decoder") is False:  # made for both directions, and for one where it is told so
        plain["is_decoder"] = True
    if known.get("causal") is False:
        plain["causal"] = True
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):  # one layer of each type
        types = list(dict.fromkeys(known.get(name) or ()))
        if len(types) > 1:
            plain[name] = (types * 2)[: plain.get("num_hidden_layers", 2)]
    return {**plain, **parts, **EXTRA.get(kind.model_type, {})}


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    Attributes:
        attention, ffn, experts: how many of its layers have heads, neurons and experts that are known.
        trained: whether it was trained for two steps, exported, and answered alike.
        reason: why it was not.
    """

    attention: int = 0
    ffn: int = 0
    experts: int = 0
    layers: int = 0
    trained: bool = False
    reason: str = ""

    @property
    def known(self) -> str:
        """Of which parts heads, neurons and experts are known, in words."""
        counts = {"attention": self.attention, "FFN": self.ffn, "experts": self.experts}
        if self.attention == self.ffn == self.layers:
            return "attention, FFN"
        parts = [name if count == self.layers else f"{name} in some layers" for name, count in counts.items() if count]
        return ", ".join(parts) or "nothing"


def try_family(kind: type[PretrainedConfig], folder: Path, tokenizer: Any) -> Outcome:
    """Train a tiny model of a family for two steps, export it, and compare what the folder answers.

    Raises:
        AssertionError: it is not refused, and tokens see what lies behind them, something that was frozen moved, or the
            exported model answers otherwise than the trained one.
    """
    if kind.model_type in OTHERS:  # some need another model's config besides
        return Outcome(reason=f"it {OTHERS[kind.model_type]}")
    try:
        config = tiny_config(kind)
        anatomy = read_anatomy(config)
    except UserError as error:
        return Outcome(reason=_line(error))
    heads, neurons, experts = (
        sum(anatomy.has(i, m) for i in range(anatomy.num_layers)) for m in ("o_proj", "down_proj", "experts")
    )
    seen = Outcome(heads, neurons, experts, anatomy.num_layers)
    used = make_folder(config, folder / "model", tokenizer)
    try:
        train_and_compare(folder, anatomy, used)
    except UserError as error:
        return replace(seen, reason=_line(error))
    return replace(seen, trained=True)


def _line(error: Exception) -> str:
    """What an error says, without what differs from call to call."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^(model\.name: )?(model type [\w-]+ )?(cannot be built: )?", "", text)
    return re.sub(r"[/\w.-]*/model\b", "it", text).split(" You can instal")[0].split("; ")[0][:160]


def make_folder(config: PretrainedConfig, folder: Path, tokenizer: Any) -> list[str]:
    """Write a random model of a config, and a tokenizer; returns which parameters take part in what it answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(config).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    config.save_pretrained(folder)  # of some families the text model alone is saved, which nothing else is called by
    tokenizer.save_pretrained(folder)
    return look_at(model.eval())


def look_at(model: PreTrainedModel) -> list[str]:
    """The parameters that have a gradient.

    Raises:
        AssertionError: a token's logits change with what lies behind it, or do not change with itself.
    """
    length, generator = 9, torch.Generator().manual_seed(1)
    first, other = (torch.randint(3, 300, (length,), generator=generator) for _ in range(2))
    place = torch.arange(length)
    ids = torch.where(place < place[:, None], first, other)  # row t: otherwise from token t on
    ids = torch.cat([ids, first[None]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    for t in range(length):
        torch.testing.assert_close(logits[t, :t], logits[-1, :t], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits[t, t], logits[-1, t], rtol=1e-4, atol=1e-4)
    logits[-1].sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def train_and_compare(folder: Path, anatomy: Anatomy, used: list[str]) -> None:
    """Train `folder/model`, all of its layers as far as they are `used`, by modules where all are known; export it and
    compare."""
    from cofitune.recipes.export import export
    from cofitune.recipes.train.recipe import train

    words = ("court", "lease", "Paris", "buyer")
    data = write_jsonl(folder / "data.jsonl", ({"instruction": f"Say {w}", "output": w} for w in words))
    names = [n for n in used if n.startswith(f"{anatomy.layout.layers}.")]
    by_modules = not anatomy.unknown and all(len(together) == 1 for together in anatomy.converted.values())
    region = {"layers": "all", "modules": ["all"]} if by_modules else {"match": "|".join(map(re.escape, names))}
    config = Config.model_validate(
        {
            "model": {"name": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(data), "max_length": 48},
            "region": region,
            "softmask": {"apply_to": "none"},
            "train": {
                "learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2, "prefix_cache": "none",
                "gradient_checkpointing": anatomy.can_recompute,
            },
            "deepspeed": {"zero_stage": 2},  # which starts faster
            "output_dir": str(folder / "run"),
        }
    )  # fmt: skip
    quiet = Console(quiet=True)
    train(config, console=quiet)
    export(folder / "run", folder / "out", console=quiet)
    compare_export(folder)


def compare_export(folder: Path) -> None:
    """What is exported is the base with the delta in its place: file by file, and in what it answers."""
    from cofitune.model.load import load_model
    from cofitune.model.weight_files import fingerprint
    from cofitune.training.delta import apply_delta, read_delta

    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    delta = read_delta(folder / "run" / "train", fingerprint(str(folder / "model")))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    models = [load_model(str(folder / name), torch.float32).eval() for name in ("model", "out")]
    apply_delta(models[0], delta)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = [m(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits for m in models]
    assert torch.equal(*answers)
