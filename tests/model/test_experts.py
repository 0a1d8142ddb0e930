"""Mixtures of experts, as tiny random models, against a copy of them that has each expert as a module of its own.

The copy's experts are written here by the formulae of the families' own papers, expert by expert. What the tensors of
all experts do under gates and masks is compared with what the copy's experts do, one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from cofitune.data.batches import plan_steps
from cofitune.data.chat import Example
from cofitune.importance.estimate import EstimatorSettings, estimate
from cofitune.importance.gates import virtual_gates
from cofitune.importance_file import EXPERTS, unit_counts
from cofitune.model.anatomy import anatomy_of
from cofitune.model.recognise import as_in_files
from cofitune.model.region import freeze_outside, resolve_region
from cofitune.softmask.factors import build_factors
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.update import mask_updates
from cofitune.training.delta import collect
from cofitune.training.engine import EngineSettings, release, start_distributed, start_engine
from cofitune.training.loop import FitSettings, fit
from cofitune.zero import inner_optimizer, shards
from tests.helpers import freeze_imports

E, K, H, F, V = 4, 2, 32, 24, 64
SIZES: dict[str, Any] = {
    "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "vocab_size": V, "num_experts_per_tok": K, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLMOE = {name: size for name, size in SIZES.items() if name != "head_dim"}
LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
SHARED = {"n_routed_experts": E, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=F, num_local_experts=E),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, intermediate_size=48, moe_intermediate_size=F, num_experts=E),
    "olmoe": lambda: OlmoeConfig(**OLMOE, intermediate_size=F, num_experts=E),
    "gpt_oss": lambda: GptOssConfig(**SIZES, intermediate_size=F, num_local_experts=E),
    "deepseek_v2": lambda: DeepseekV2Config(
        **{**SIZES, **LATENT, **SHARED}, intermediate_size=48, moe_intermediate_size=F
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SIZES, **LATENT, **SHARED}, intermediate_size=48, moe_intermediate_size=F
    ),
    "glm4_moe": lambda: Glm4MoeConfig(**SIZES, **SHARED, intermediate_size=48, moe_intermediate_size=F),
}
DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "glm4_moe")


def build(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)); gpt-oss has biases, other activations, and its gate and up in turns."""

    def __init__(self, family: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict({name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()})
        self.family = family

    def forward(self, x: Tensor) -> Tensor:
        own = self.tensors
        if self.family != "gpt_oss":
            gate, up = x @ own["gate_up_proj"][:F].T, x @ own["gate_up_proj"][F:].T
            return (nn.functional.silu(gate) * up) @ own["down_proj"].T
        both = x @ own["gate_up_proj"] + own["gate_up_proj_bias"]
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ own["down_proj"] + own["down_proj_bias"]


class Experts(nn.Module):
    """Each token through its experts, one token and one expert at a time."""

    def __init__(self, family: str, whole: nn.Module) -> None:
        super().__init__()
        tensors = {name: p.detach() for name, p in whole.named_parameters()}
        self.experts = nn.ModuleList(Expert(family, {n: t[e] for n, t in tensors.items()}) for e in range(E))

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = [
            sum(weights[n, k] * self.experts[int(chosen[n, k])](tokens[n : n + 1]) for k in range(chosen.shape[1]))
            for n in range(len(tokens))
        ]
        return torch.cat([row for row in rows if isinstance(row, Tensor)])


def by_expert(family: str, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[int, Any]]:
    """A copy whose experts are modules, and its layers' lists of them."""
    twin, path = copy.deepcopy(model), anatomy_of(model).experts
    found: dict[int, Any] = {}
    for index, layer in enumerate(twin.get_submodule("model.layers").children()):
        if any(name == path for name, _ in layer.named_modules()):
            made = Experts(family, layer.get_submodule(path))
            layer.set_submodule(path, made)
            found[index] = made.experts
    return twin, found


def random_ids() -> Tensor:
    return torch.randint(3, V, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_answers_as_the_model_and_its_experts_are_counted(family: str) -> None:
    model = build(family)
    twin, experts = by_expert(family, model)
    with torch.no_grad():
        torch.testing.assert_close(twin(random_ids()).logits, model(random_ids()).logits, rtol=1e-4, atol=1e-4)
    anatomy = anatomy_of(model)
    assert (anatomy.num_experts, anatomy.experts_per_token) == (E, K)
    assert [anatomy.has(layer, "experts") for layer in range(2)] == [family not in DENSE_FIRST, True]
    region = resolve_region("1", ["experts"], 2, anatomy.modules)
    assert region.num_parameters(anatomy) == sum(p.numel() for p in experts[1].parameters())
    assert "experts" not in resolve_region("all", ["all"], 2, anatomy.modules).modules, "only where it is named"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_is_its_experts_output_scaled(family: str) -> None:
    """Closing a gate by a little = scaling what the expert writes: its down weight, and the bias there."""
    model = build(family)
    direction = torch.randn(3, 7, V, generator=torch.Generator().manual_seed(1))
    with virtual_gates(model, 0.0) as gates:
        leaves = gates.renew(3)[EXPERTS]
        loss = (model(random_ids()).logits * direction).sum(dim=(1, 2))
        rows = [torch.autograd.grad(one, leaves[1], retain_graph=True)[0] for one in loss]
    for sample in range(3):
        twin, experts = by_expert(family, model)
        (twin(random_ids()).logits[sample] * direction[sample]).sum().backward()
        own = [[p for n, p in expert.tensors.items() if n.startswith("down")] for expert in experts[1]]
        expected = torch.stack(
            [sum((p.grad * p).sum() for p in e if p.grad is not None) + torch.zeros(()) for e in own]
        )
        torch.testing.assert_close(rows[sample][sample], expected.detach(), rtol=1e-3, atol=1e-3)
        others = [other for other in range(3) if other != sample]
        assert not rows[sample][others].any(), "a sample's gates are its own"


SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.float32, micro_batch=3,
    accumulation=1, learning_rate=5e-3, weight_decay=0.3, adam_betas=(0.9, 0.95), adam_epsilon=1e-4, max_grad_norm=1.0,
    lr_scheduler_type="constant", warmup_ratio=0.0, num_steps=2,
)  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "mask", "stage"), [(f, m, 3 - (m == "gradient")) for f in FAMILIES for m in ("update", "gradient")]
)
def test_two_masked_steps_are_the_copys(family: str, mask: str, stage: int) -> None:
    start_distributed()
    freeze_imports()  # engines of the cases before stay in memory, and DeepSpeed has Python look through all of them
    model = build(family)
    anatomy = anatomy_of(model)
    generator = torch.Generator().manual_seed(5)
    importance = {kind: torch.rand(2, units, generator=generator) for kind, units in unit_counts(anatomy).items()}
    importance[EXPERTS][1, 1] = 1.0  # must not move in update mode
    twin, experts = by_expert(family, model)
    twin.requires_grad_(False)
    trained = {(e, n): p.requires_grad_() for e, expert in enumerate(experts[1]) for n, p in expert.tensors.items()}
    groups = [  # biases do not decay, though one tensor of two dimensions holds those of all experts
        {"params": [p for (_, n), p in trained.items() if n.endswith("bias") == bias], "weight_decay": 0.3 * (not bias)}
        for bias in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-4)
    before = {key: p.detach().clone() for key, p in trained.items()}
    for _ in range(2):
        optimizer.zero_grad()
        logits = twin(random_ids()).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), random_ids()[:, 1:].flatten()).backward()
        for (e, _), p in trained.items():  # an expert that no token came by has a gradient of zeros in the whole tensor
            p.grad = (
                torch.zeros_like(p)
                if p.grad is None
                else p.grad * (1 - importance[EXPERTS][1, e] * (mask == "gradient"))
            )
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        old = {key: p.detach().clone() for key, p in trained.items()}
        optimizer.step()
        with torch.no_grad():
            for key, p in trained.items():
                p.copy_(old[key] + (1 - importance[EXPERTS][1, key[0]] * (mask == "update")) * (p - old[key]))
    region = resolve_region("1", ["experts"], 2, anatomy.modules)
    freeze_outside(model, set(region.parameter_names(anatomy)))
    factors = build_factors(importance, region, region.modules, anatomy)
    mask_gradients(model, factors if mask == "gradient" else {})
    engine = start_engine(model, replace(SETTINGS, zero_stage=stage))
    mask_updates(inner_optimizer(engine), shards(engine), factors if mask == "update" else {})
    examples = [Example(ids, ids) for ids in random_ids().tolist()]
    fit(engine, examples, FitSettings(plan_steps(3, 3, 1, 1, 1, 2), 0, 0), lambda record, step: None)
    whole = collect(model, region.parameter_names(anatomy))
    release(engine)
    for (e, name), expected in trained.items():
        moved = whole[f"model.layers.1.{anatomy.experts}.{name}"][e] - before[e, name]
        should = expected.detach() - before[e, name]
        if e == 1 and (mask == "update" or name.endswith("bias")):  # in gradient mode decay alone moves it
            assert not moved.any()
        else:
            assert should.norm() > 1e-3 * before[e, name].norm()
            assert (moved - should).norm() <= 2e-3 * should.norm(), (e, name)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_oss"])
def test_weight_files_hold_an_expert_a_tensor(family: str) -> None:
    """What is exported is what transformers itself would save, name by name."""
    model = build(family)
    _, experts = by_expert(family, model)
    anatomy = anatomy_of(model)
    names = set(resolve_region("1", ["experts"], 2, anatomy.modules).parameter_names(anatomy))
    assert names <= set(anatomy.converted)
    written = as_in_files(model, {n: p.detach() for n, p in model.named_parameters() if n in names})
    assert len(written) == 3 * E
    parts = [(("gate_proj", "w1"), "gate_up_proj", slice(F)), (("up_proj", "w3"), "gate_up_proj", slice(F, None))]
    for ends, whole, rows in (*parts, (("down_proj", "w2"), "down_proj", slice(None))):
        for e, expert in enumerate(experts[1]):
            (name,) = (n for n in written if f".experts.{e}." in n and n.split(".")[-2] in ends)
            assert torch.equal(written[name], expert.tensors[whole][rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_has_a_score_for_each_expert(family: str) -> None:
    ids = random_ids()
    batches = [(0, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})]
    scores = estimate(build(family), batches, EstimatorSettings(dropout=0.1, seed=1)).values[EXPERTS]
    assert tuple(scores.shape) == (2, E)
    assert scores[1].std() > 0 and bool(scores[0].any()) == (family not in DENSE_FIRST)
