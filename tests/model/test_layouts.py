"""Every layout, as a tiny random model, against an unfused copy of it that knows each unit by name.

The copy has plain linear modules q_proj … down_proj, split here by the formulae of the families' own forward passes,
and must answer as the model does. What the model's fused, interleaved and transposed tensors do under the mask is then
compared with what the copy's rows do, masked one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    NanoChatConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from cofitune.data.batches import plan_steps
from cofitune.data.chat import Example
from cofitune.errors import UserError
from cofitune.importance.estimate import EstimatorSettings, estimate
from cofitune.importance.gates import seeded_dropout, virtual_gates
from cofitune.importance_file import ATTENTION_HEADS, COLUMNS, FFN_NEURONS, FFN_OUTPUTS, ROWS, unit_counts
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.model.region import freeze_outside, resolve_region
from cofitune.softmask.factors import build_factors, freeze_factors, join
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.update import mask_updates
from cofitune.training.delta import collect
from cofitune.training.engine import EngineSettings, release, start_distributed, start_engine
from cofitune.training.hashing import hash_parameters
from cofitune.training.loop import FitSettings, fit
from cofitune.zero import inner_optimizer, shards
from tests.helpers import freeze_imports

L, H, F, A, K, D, V = 2, 32, 48, 4, 2, 8, 64
SIZES: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": A,
    "num_key_value_heads": K, "head_dim": D, "vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_GROUPS = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
WITHOUT_HEAD_DIM = {k: v for k, v in SIZES.items() if k != "head_dim"}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
FALCONS = ("falcon", "falcon_7b", "falcon_rw")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"n_embd": H, "n_inner": F, "n_layer": L, "n_head": A, "vocab_size": V, **NO_DROPOUT}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES),
    "olmo2": lambda: Olmo2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES),
    "gemma3_text": lambda: Gemma3TextConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**WITHOUT_GROUPS),
    "gpt2": lambda: GPT2Config(**GPT2),
    "glm4": lambda: Glm4Config(**SIZES),
    "phi": lambda: PhiConfig(**WITHOUT_HEAD_DIM),
    "starcoder2": lambda: Starcoder2Config(**WITHOUT_HEAD_DIM, residual_dropout=0.0, embedding_dropout=0.0),
    "stablelm": lambda: StableLmConfig(**WITHOUT_HEAD_DIM),
    "nemotron": lambda: NemotronConfig(**SIZES),
    "apertus": lambda: ApertusConfig(**WITHOUT_HEAD_DIM),
    "nanochat": lambda: NanoChatConfig(**WITHOUT_HEAD_DIM),
    "opt": lambda: OPTConfig(**WITHOUT_GROUPS, ffn_dim=F, word_embed_proj_dim=H, dropout=0.0),
    "persimmon": lambda: PersimmonConfig(**WITHOUT_GROUPS),
    "falcon": lambda: FalconConfig(**WITHOUT_GROUPS, ffn_hidden_size=F, new_decoder_architecture=True, num_kv_heads=K),
    "falcon_7b": lambda: FalconConfig(**WITHOUT_GROUPS, ffn_hidden_size=F, multi_query=True),
    "falcon_rw": lambda: FalconConfig(
        **WITHOUT_GROUPS, ffn_hidden_size=F, multi_query=False, alibi=True, bias=True, parallel_attn=False
    ),
    "bloom": lambda: BloomConfig(**WITHOUT_GROUPS),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**GPT2, multi_query=True),
    "gptj": lambda: GPTJConfig(**GPT2, rotary_dim=4),
    "gpt_neo": lambda: GPTNeoConfig(
        **WITHOUT_GROUPS, attention_types=[[["global", "local"], 1]], resid_dropout=0.0, embed_dropout=0.0
    ),
    "mpt": lambda: MptConfig(d_model=H, n_heads=A, n_layers=L, vocab_size=V, expansion_ratio=F // H + 1),
    # what lies beside or in place of attention, a convolution or a state space, has no units
    "lfm2": lambda: Lfm2Config(
        **WITHOUT_HEAD_DIM, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "falcon_h1": lambda: FalconH1Config(**SIZES, **MAMBA, mamba_d_ssm=64),
    "bamba": lambda: BambaConfig(**WITHOUT_HEAD_DIM, **MAMBA, attn_layer_indices=[1]),
    "granite_hybrid": lambda: GraniteMoeHybridConfig(
        **WITHOUT_HEAD_DIM, **MAMBA, shared_intermediate_size=F, layer_types=["mamba", "attention"],
        num_local_experts=0, num_experts_per_tok=0,
    ),
}  # fmt: skip
HYBRIDS = ("lfm2", "bamba", "granite_hybrid")  # layer 0 has no attention
FUSED = ("phi3", "gpt_neox", "gpt2", "glm4", "persimmon", *FALCONS, "bloom", "gpt_bigcode", "mpt", "granite_hybrid")
INTERLEAVED = ("gpt_neox", "persimmon", *FALCONS, "bloom", "gpt_bigcode")
EAGER = ("gemma2", "mpt", "gpt_neo", "bloom", "gptj")  # those that have no other kernel
NOTHING_DROPS = ("falcon", "falcon_7b", "lfm2")
FFN_WIDTH = {"bloom": 4 * H, "mpt": 4 * H}
MHA, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def build(family: str, kernel: str = "sdpa") -> PreTrainedModel:
    """A tiny model whose weights, biases included, are away from zero, so that weight decay shows."""
    return copy.deepcopy(_built(family, "eager" if family in EAGER else kernel))


@cache  # a copy takes half the time
def _built(family: str, kernel: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = FAMILIES[family]()
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class Together(nn.Module):
    """Plain linear modules whose outputs are put together as the fused module's were."""

    def __init__(self, parts: dict[str, nn.Linear], interleaved: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts.values()]
        if self.interleaved:  # [B, T, key/value heads, (its q heads, k, v), D]
            groups = outputs[1].shape[-1] // D
            outputs = [torch.cat([o.unflatten(-1, (groups, -1)) for o in outputs], -1).flatten(-2)]
        return torch.cat(outputs, -1)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def split(family: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A module's weight [out, in] (of Conv1D [in, out]) or bias, by our modules' names; by hand, family by family."""
    if family == "gpt2":
        tensor = tensor.T if tensor.dim() == 2 else tensor
    if name == "qkv_proj":
        return {"q_proj": tensor[: A * D], "k_proj": tensor[A * D : A * D + K * D], "v_proj": tensor[A * D + K * D :]}
    if name in ("gate_up_proj", "input_linear"):
        return {"gate_proj": tensor[:F], "up_proj": tensor[F:]}
    if name == "query_key_value" or (family == "gpt_bigcode" and name == "c_attn"):
        groups = {"falcon": K, "falcon_7b": 1, "gpt_bigcode": 1}.get(family, A)
        blocks = tensor.split(len(tensor) // groups)  # a key/value head each
        q, k, v = [b[: -2 * D] for b in blocks], [b[-2 * D : -D] for b in blocks], [b[-D:] for b in blocks]
        return {m: torch.cat(parts) for m, parts in zip(MHA, (q, k, v), strict=False)}
    if name in ("c_attn", "Wqkv"):
        return {m: tensor[H * i : H * (i + 1)] for i, m in enumerate(MHA[:3])}
    whole = {"dense": "o_proj", "out_proj": "o_proj"}
    whole |= dict.fromkeys(("dense_h_to_4h", "c_fc", "fc1", "fc_in"), "up_proj")
    whole |= dict.fromkeys(("dense_4h_to_h", "fc2", "fc_out", "output_linear"), "down_proj")
    whole |= {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return {whole[name]: tensor}


def in_gpt2(path: str, name: str) -> str:
    return {"attn.c_proj": "o_proj", "mlp.c_proj": "down_proj"}.get(path, name)


H_LISTS = ("gpt2", *FALCONS, "bloom", "gpt_bigcode", "gptj", "gpt_neo")
WHERE = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "mpt": "transformer.blocks"}


def layers_of(family: str, model: Any) -> nn.ModuleList:
    path = WHERE.get(family, "transformer.h" if family in H_LISTS else "model.layers")
    return model.get_submodule(path)


GPT2_PATHS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
QKV_PATHS = tuple(f"self_attn.{m}" for m in MHA[:3])


def linear_paths(family: str) -> dict[str, str]:
    """Paths of a layer's linear modules → the name to split them by."""
    paths = {
        "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "gpt2": GPT2_PATHS,
        "gpt_bigcode": GPT2_PATHS,
        "glm4": (*(f"self_attn.{m}" for m in MHA), "mlp.gate_up_proj", "mlp.down_proj"),
        "phi": (*QKV_PATHS, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
        "starcoder2": (*QKV_PATHS, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
        **dict.fromkeys(("nemotron", "apertus"), (*(f"self_attn.{m}" for m in MHA), "mlp.up_proj", "mlp.down_proj")),
        "nanochat": (*(f"self_attn.{m}" for m in MHA), "mlp.fc1", "mlp.fc2"),
        "opt": (*QKV_PATHS, "self_attn.out_proj", "fc1", "fc2"),
        "persimmon": ("self_attn.query_key_value", "self_attn.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        **dict.fromkeys(
            (*FALCONS, "bloom"),
            ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        "gptj": (*(f"attn.{m}" for m in MHA[:3]), "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
        "gpt_neo": (*(f"attn.attention.{m}" for m in MHA[:3]), "attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj"),
        "lfm2": (*QKV_PATHS, "self_attn.out_proj", *(f"feed_forward.{w}" for w in ("w1", "w3", "w2"))),
        **dict.fromkeys(
            ("falcon_h1", "bamba"), (*(f"self_attn.{m}" for m in MHA), *(f"feed_forward.{m}" for m in FFN))
        ),
        "granite_hybrid": (*(f"self_attn.{m}" for m in MHA), "shared_mlp.input_linear", "shared_mlp.output_linear"),
        "mpt": ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
    }.get(family, (*(f"self_attn.{m}" for m in MHA), *(f"mlp.{m}" for m in FFN)))
    return {path: in_gpt2(path, path.rsplit(".", 1)[-1]) for path in paths}


def in_layer(family: str, layer: nn.Module) -> dict[str, str]:
    """Those of its linear modules that a layer has."""
    there = {path for path, _ in layer.named_modules()}
    return {path: name for path, name in linear_paths(family).items() if path in there}


def has_units(family: str, kind: str, layer: int) -> bool:
    return not (family in HYBRIDS and kind == ATTENTION_HEADS and layer == 0)


def parts_of(family: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in (*MHA, *FFN):
        return {name: tensor.T if family == "gpt2" and tensor.dim() == 2 else tensor}
    return split(family, name, tensor)


def unfused(family: str, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[tuple[int, str], nn.Linear]]:
    """A copy made of plain linear modules, and each of them by (layer, module)."""
    twin = copy.deepcopy(model)
    results: dict[tuple[int, str], nn.Linear] = {}
    for index, layer in enumerate(layers_of(family, twin)):
        for path, name in in_layer(family, layer).items():
            old: Any = layer.get_submodule(path)
            biases = parts_of(family, name, old.bias) if old.bias is not None else {}
            made = {m: linear(w, biases.get(m)) for m, w in parts_of(family, name, old.weight).items()}
            results.update({(index, module): one for module, one in made.items()})
            new = Together(made, family in INTERLEAVED) if len(made) > 1 else next(iter(made.values()))
            layer.set_submodule(path, new)
    return twin, results


def trained_parts(family: str, model: PreTrainedModel) -> dict[tuple[int, str, str], Tensor]:
    """A model's tensors by (layer, module, weight or bias)."""
    results = {}
    for index, layer in enumerate(layers_of(family, model)):
        for path, name in in_layer(family, layer).items():
            for kind in ("weight", "bias"):
                tensor = getattr(layer.get_submodule(path), kind, None)
                if tensor is not None:
                    results.update({(index, m, kind): t for m, t in parts_of(family, name, tensor.detach()).items()})
    return results


def factor_of(importance: dict[str, Tensor], anatomy: Anatomy, layer: int, module: str, tensor: Tensor) -> Tensor:
    """The factor of each element of one of the copy's tensors, unit by unit."""
    group = anatomy.num_heads // anatomy.num_key_value_heads
    factor = torch.ones_like(tensor)
    if module in MHA:
        for head in range(anatomy.num_heads):
            importances = importance[ATTENTION_HEADS][layer]
            if module == "o_proj" and tensor.dim() == 2:
                factor[:, D * head : D * (head + 1)] = 1 - importances[head]
            elif module == "q_proj":
                factor[D * head : D * (head + 1)] = 1 - importances[head]
            elif module in ("k_proj", "v_proj"):
                served = head // group
                factor[D * served : D * (served + 1)] = 1 - importances[group * served : group * (served + 1)].max()
        return factor
    values = importance[FFN_OUTPUTS if module == "down_proj" else FFN_NEURONS][layer]
    for row in range(len(tensor)):
        factor[row] = 1 - values[row]
    return factor


def column_factor_of(
    importance: dict[str, Tensor], anatomy: Anatomy, layer: int, module: str, tensor: Tensor, masked: tuple[str, ...]
) -> Tensor:
    """The factor of each element of one of the copy's tensors, input column by input column; a bias has none."""
    factor = torch.ones_like(tensor)
    sharing = [m for m in anatomy.layout.parts(module) if m in masked]
    for column in range(tensor.shape[1] if tensor.dim() == 2 else 0):
        factor[:, column] = 1 - max(float(importance[f"{m}_columns"][layer, column]) for m in sharing)
    return factor


def random_importance(anatomy: Anatomy, axis: str = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    counts = unit_counts(anatomy, axis)
    importance = {k: torch.rand(anatomy.num_layers, units, generator=generator) for k, units in counts.items()}
    for values in importance.values():
        values[:, 1] = 1.0  # must not move in update mode
    return importance


def random_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(seed))


# where positions are not rotated into them, keys' biases have no gradient: a tiny epsilon would blow up its rounding
SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.float32, micro_batch=4,
    accumulation=1, learning_rate=5e-3, weight_decay=0.3, adam_betas=(0.9, 0.95), adam_epsilon=1e-4, max_grad_norm=1.0,
    lr_scheduler_type="constant", warmup_ratio=0.0, decay_all=True, num_steps=2,
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unfused_copy_answers_as_the_model(family: str) -> None:
    model = build(family)
    twin, modules = unfused(family, model)
    with torch.no_grad():
        torch.testing.assert_close(twin(random_ids()).logits, model(random_ids()).logits, rtol=1e-4, atol=1e-4)
    assert {m for _, m in modules} == set(anatomy_of(model).modules)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("modules", [("all",), ("q_proj", "up_proj"), ("mha",), ("v_proj", "o_proj", "down_proj")])
def test_counts_and_what_requires_gradients(family: str, modules: tuple[str, ...]) -> None:
    model = build(family)
    anatomy = anatomy_of(model)
    region = resolve_region("1", modules, L, anatomy.modules)
    parts = trained_parts(family, model)
    by_hand = sum(t.numel() for (i, m, _), t in parts.items() if i == 1 and m in region.modules)
    assert region.num_parameters(anatomy) == by_hand
    freeze_outside(model, set(region.parameter_names(anatomy)))
    touched = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert touched == region.num_touched(anatomy) == region.num_parameters(anatomy) + region.num_held(anatomy)
    apart = any(not set(anatomy.layout.parts(m)) <= set(region.modules) for m in region.modules)
    assert bool(region.num_held(anatomy)) == apart and (apart <= (family in FUSED))
    assert all(not p.requires_grad for n, p in model.named_parameters() if "norm" in n or ".ln_" in n)


def reference_step(family: str, model: PreTrainedModel, case: dict[str, Any]) -> dict[tuple[int, str, str], Tensor]:
    """Two steps of the unfused copy in plain PyTorch; each module's own tensors trained or frozen, and masked."""
    anatomy = anatomy_of(model)
    twin, modules = unfused(family, model)
    axis = case.get("axis", ROWS)
    importance = random_importance(anatomy, axis)
    twin.requires_grad_(False)
    trained = {
        (i, m, kind): p
        for (i, m), one in modules.items()
        for kind, p in one.named_parameters()
        if i in case["layers"] and m in case["modules"]
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    masked = (case["modules"],) if axis == COLUMNS else ()
    by_hand: Any = column_factor_of if axis == COLUMNS else factor_of
    factors = {key: by_hand(importance, anatomy, key[0], key[1], p, *masked) for key, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        logits = twin(random_ids()).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), random_ids()[:, 1:].flatten()).backward()
        if case["mask"] == "gradient":
            for key, parameter in trained.items():
                parameter.grad = parameter.grad * factors[key] if parameter.grad is not None else None
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        old = {key: p.detach().clone() for key, p in trained.items()}
        optimizer.step()
        if case["mask"] == "update":
            with torch.no_grad():
                for key, parameter in trained.items():
                    parameter.copy_(old[key] + factors[key] * (parameter - old[key]))
    return {(i, m, kind): p.detach() for (i, m), one in modules.items() for kind, p in one.named_parameters()}


PARTS = (("q_proj", "v_proj", "up_proj", "down_proj"), ("k_proj", "o_proj"))
IN_PARTS = ("phi3", "gpt_neox", "gpt2", "falcon")
CASES = [
    *((family, mask, 3, ()) for family in FAMILIES for mask in ("update", "gradient")),
    *(
        (family, mask, 3, part)
        for family in ("phi3", "gpt_neox", "gpt2", "falcon")
        for part in PARTS
        for mask in ("none", "update", "gradient")
    ),
    *((family, "update", 2, PARTS[0]) for family in FUSED[:3]),
    ("gpt_neox", "update", 1, PARTS[0]),
]


@pytest.mark.processes
@pytest.mark.parametrize(("family", "mask", "stage", "modules"), CASES)
def test_the_masked_step_is_the_unfused_copys(family: str, mask: str, stage: int, modules: tuple[str, ...]) -> None:
    from dataclasses import replace

    start_distributed()
    freeze_imports()  # engines of the cases before stay in memory, and DeepSpeed has Python look through all of them
    model = build(family)
    before = trained_parts(family, build(family))
    anatomy = anatomy_of(model)
    region = resolve_region("1", modules or ("all",), L, anatomy.modules)
    expected = reference_step(family, model, {"layers": region.layers, "modules": region.modules, "mask": mask})
    factors = build_factors(random_importance(anatomy), region, region.modules, anatomy)
    held = freeze_factors(region, anatomy)
    freeze_outside(model, set(region.parameter_names(anatomy)))
    mask_gradients(model, join(held, factors if mask == "gradient" else {}))
    engine = start_engine(model, replace(SETTINGS, zero_stage=stage))
    mask_updates(inner_optimizer(engine), shards(engine), join(held, factors if mask == "update" else {}))
    frozen = hash_parameters(model, [], held)
    examples = [Example(ids, ids) for ids in random_ids().tolist()]
    fit(engine, examples, FitSettings(plan_steps(4, 4, 1, 1, 1, 2), 0, 0), lambda record, step: None)
    assert hash_parameters(model, [], held) == frozen
    assert bool(frozen) == bool(modules)
    whole = collect(model, [n for n, _ in model.named_parameters()])
    release(engine)
    after = build(family)
    after.load_state_dict(whole, strict=False)
    got = trained_parts(family, after)
    assert got.keys() == expected.keys()
    for (layer, module, kind), tensor in got.items():
        key = (layer, module, kind)
        if layer not in region.layers or module not in region.modules:
            assert torch.equal(tensor, before[key]), key
            continue
        moved, should = tensor - before[key], expected[key] - before[key]
        if anatomy.num_key_value_heads == 1 and mask == "update" and module in ("k_proj", "v_proj"):
            assert not moved.any() and not should.any(), "the one key/value head serves the head of importance 1, too"
            continue
        assert should.norm() > 1e-3 * before[key].norm(), f"{key} hardly moved: the comparison would prove nothing"
        assert (moved - should).norm() <= 2e-3 * should.norm(), key


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_the_units_own_weights_scaled(family: str) -> None:
    """Closing a gate by a little = scaling what the unit feeds on (o_proj's and down_proj's columns) or writes."""
    model = build(family)
    anatomy = anatomy_of(model)
    direction = torch.randn(4, 9, V, generator=torch.Generator().manual_seed(1))
    with virtual_gates(model, 0.0) as gates:
        leaves = gates.renew(4)
        loss = (model(random_ids()).logits * direction).sum()
        flat = iter(torch.autograd.grad(loss, [g for kind in leaves.values() for g in kind], allow_unused=True))
        got = {kind: [next(flat) for _ in layers] for kind, layers in leaves.items()}
    twin, modules = unfused(family, model)
    (twin(random_ids()).logits * direction).sum().backward()
    for layer in range(L):
        assert (got[ATTENTION_HEADS][layer] is not None) == has_units(family, ATTENTION_HEADS, layer)
        out: Any = modules.get((layer, "o_proj"), modules[1, "o_proj"])
        down: Any = modules[layer, "down_proj"]
        by_column = (out.weight * out.weight.grad).sum(0)
        heads = torch.stack([by_column[D * a : D * (a + 1)].sum() for a in range(anatomy.num_heads)])
        neurons = (down.weight * down.weight.grad).sum(0)
        outputs = (down.weight * down.weight.grad).sum(1)
        if down.bias is not None:
            outputs = outputs + down.bias * down.bias.grad
        for kind, expected in ((ATTENTION_HEADS, heads), (FFN_NEURONS, neurons), (FFN_OUTPUTS, outputs)):
            if has_units(family, kind, layer):
                torch.testing.assert_close(got[kind][layer].sum(0), expected.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", NOTHING_DROPS)
def test_what_drops_nothing_has_no_dropout_to_switch_on(family: str) -> None:
    with pytest.raises(UserError, match="use importance.estimator: fisher"), virtual_gates(build(family), 0.1):
        pass


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NOTHING_DROPS])
def test_importance_drops_attention_and_ffn_outputs_and_nothing_else(family: str, kernel: str) -> None:
    model = build(family, kernel)
    anatomy = anatomy_of(model)
    seen: list[float] = []

    def logits(seed: int, silent: str) -> Tensor:
        """Logits under dropout, of the attention alone (what the FFN writes is silenced) or the FFN alone."""
        module = "down_proj" if silent == "ffn" else "o_proj"
        path, layout = anatomy.layout.modules[module], anatomy.layout
        layers = [layer for i, layer in enumerate(layers_of(family, model)) if anatomy.has(i, module)]
        with virtual_gates(model, 0.3) as gates, seeded_dropout(seed, 0, 0, torch.device("cpu")), torch.no_grad():
            gates.renew(4)
            hooks = [
                layer.get_submodule(path).register_forward_hook(lambda m, i, o: torch.zeros_like(o)) for layer in layers
            ]
            result: Tensor = model(random_ids()).logits
            own = [
                getattr(module, layout.attention_dropout, None)
                for layer in layers_of(family, model)
                for name, module in layer.named_modules()
                if name == layout.attention
            ]
            awake = (m for m in model.modules() if isinstance(m, nn.Dropout) and m.training)
            seen.extend(m.p for m in awake if all(m is not one for one in own))
            for hook in hooks:
                hook.remove()
        return result

    for silent in ("ffn", "attention"):
        assert torch.equal(logits(1, silent), logits(1, silent))
        assert not torch.equal(logits(1, silent), logits(2, silent)), f"{silent} silent: nothing drops"
    assert not seen, "a dropout of the model's own is awake"


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_of_every_layout(family: str) -> None:
    batches = [(i, {"input_ids": random_ids(i), "attention_mask": torch.ones_like(random_ids())}) for i in range(3)]
    if family in NOTHING_DROPS:
        batches = [(i, {**batch, "labels": batch["input_ids"]}) for i, batch in batches]
    settings = EstimatorSettings(dropout=0.1, seed=1, estimator="fisher" if family in NOTHING_DROPS else "kl_dropout")
    scores = estimate(build(family), batches, settings).values
    widths = {ATTENTION_HEADS: A, FFN_NEURONS: FFN_WIDTH.get(family, F), FFN_OUTPUTS: H}
    for kind, values in scores.items():
        assert tuple(values.shape) == (L, widths[kind])
        known = [row for layer, row in enumerate(values) if has_units(family, kind, layer)]
        assert min(row.std() for row in known) > 0, f"{kind}: all units alike"
        assert len(known) == L or not values[0].any()
